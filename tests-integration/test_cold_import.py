"""Importing a package does nothing else, and needs no optional package.

Each import runs in a fresh Python in which the optional packages cannot be found, so what this
process has loaded already does not count.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.packages import find_packages

OPTIONAL = ["triton", "flash_attn", "xformers", "transformers"]
CHILD = f"""
import importlib, os, sys

for name in {OPTIONAL}:
    sys.modules[name] = None  # `import name` raises ModuleNotFoundError
import torch  # what torch does while it is imported is not ours to judge

def refuse_probes(function):
    def checked(*arguments, **options):
        caller = sys._getframe(1).f_globals["__name__"]
        assert caller.split(".")[0] != sys.argv[1], f"{{caller}} calls {{function.__name__}}"
        return function(*arguments, **options)
    return checked

for name in ["is_available", "device_count", "current_device", "get_device_capability"]:
    setattr(torch.cuda, name, refuse_probes(getattr(torch.cuda, name)))
before = dict(os.environ)
importlib.import_module(sys.argv[1])
assert dict(os.environ) == before, "the environment changed"
assert not torch.cuda.is_initialized(), "CUDA was initialised"
"""


def import_cold(module: str, *, path: str = "") -> str:
    """Everything a fresh process prints while it imports the module; empty if all is well."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, module],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    return result.stdout + result.stderr


@pytest.mark.parametrize("module", [package.import_name for package in find_packages().values()])
def test_importing_a_package_has_no_other_effect(module: str) -> None:
    assert import_cold(module) == ""


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("print('hello')", "hello"),
        ("import warnings; warnings.warn('old')", "UserWarning: old"),
        ("import os; os.environ['A'] = '1'", "the environment changed"),
        ("import triton", "ModuleNotFoundError: import of triton"),
        ("import torch; torch.cuda.is_available()", "nosy calls is_available"),
    ],
)
def test_each_effect_would_be_noticed(tmp_path: Path, source: str, complaint: str) -> None:
    (tmp_path / "nosy.py").write_text(source)
    assert complaint in import_cold("nosy", path=str(tmp_path))
