"""The built packages: each alone in an empty environment, as its users get it.

Slow, because every package gets an environment of its own; `nox -s wheels` runs this file. The
built files stay in dist/.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.lock import read_pins
from tools.packages import ROOT, Package, find_packages

PACKAGES = find_packages()
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheels() -> dict[str, Path]:
    """All packages, built into dist/."""
    run("uv", "build", "--quiet", "--all-packages", "--clear", "--out-dir", "dist", cwd=ROOT)
    return {
        name: ROOT / "dist" / f"{package.import_name}-{package.version}-py3-none-any.whl"
        for name, package in PACKAGES.items()
    }


@pytest.fixture(scope="module")
def constraints(wheels: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Siblings come from dist/, everything else in the pinned version."""
    path = tmp_path_factory.mktemp("constraints") / "constraints.txt"
    built = [f"{name} @ {wheel.as_uri()}" for name, wheel in wheels.items()]
    pins = read_pins((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    path.write_text("\n".join([*built, *pins.locked, *pins.vendors]))
    return path


@pytest.fixture(scope="module", params=PACKAGES.values(), ids=list(PACKAGES))
def package(request: pytest.FixtureRequest) -> Package:
    return request.param


@pytest.fixture(scope="module")
def environment(
    package: Package,
    wheels: dict[str, Path],
    constraints: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An environment with the package's wheel and what it asks for, and nothing else."""
    folder = tmp_path_factory.mktemp(package.name)
    run("uv", "venv", "--quiet", "--python", sys.executable, ".venv", cwd=folder)
    install(folder, constraints, f"{package.name} @ {wheels[package.name].as_uri()}")
    return folder


def test_a_package_is_consistent_and_importable_alone(package: Package, environment: Path) -> None:
    run("uv", "pip", "check", "--python", ".venv", cwd=environment)
    code = f"import {package.import_name} as module; print(module.__file__)"
    origin = run(".venv/bin/python", "-W", "error", "-c", code, cwd=environment)
    assert origin.startswith(str(environment / ".venv"))


def test_a_package_carries_its_licence_and_types(package: Package, wheels: dict[str, Path]) -> None:
    names = run(sys.executable, "-m", "zipfile", "-l", str(wheels[package.name]), cwd=ROOT)
    assert f"{package.import_name}/py.typed" in names
    assert ".dist-info/licenses/LICENSE" in names


def test_the_examples_of_a_readme_run_with_its_package_alone(
    package: Package, environment: Path
) -> None:
    shutil.copy(ROOT / "tools" / "page_examples.py", environment)
    page = package.folder / "README.md"
    code = (
        f"import page_examples, pathlib; print(page_examples.run_page(pathlib.Path({str(page)!r})))"
    )
    assert not run(".venv/bin/python", "-c", code, cwd=environment).startswith("(0,")


def test_a_package_passes_its_own_tests_alone(
    package: Package, environment: Path, constraints: Path
) -> None:
    shutil.copytree(package.folder / "tests", environment / "tests")
    install(environment, constraints, *map(str, package.test_group))
    options = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(environment), "-q"]
    options += ["--numprocesses=auto", "--maxprocesses=4", "--dist=worksteal"]
    run(".venv/bin/python", "-m", "pytest", *options, "tests", cwd=environment)


def install(folder: Path, constraints: Path, *requirements: str) -> None:
    # Without --python, a UV_PYTHON of the caller would choose the environment.
    command = ["uv", "pip", "install", "--quiet", "--python", ".venv"]
    run(*command, "--constraints", str(constraints), *requirements, cwd=folder)


def run(*command: str, cwd: Path) -> str:
    """Run a command; what it prints is in the failure."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        command, cwd=cwd, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}"
    return result.stdout
