"""The kernels compile for GPUs that are not here, without spills and within the shared memory.

A sample; tools/kernel_resources.py compiles everything that ships. It runs in a process of its own,
because the tests beside it may have switched on Triton's interpreter, which compiles nothing.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from dilated_kernels.fused import ahead_of_time, configs

_CODE = """
import json, sys, torch
from dilated_kernels.fused.ahead_of_time import Config, compile_kernel
for dtype, arguments, keywords in json.loads(sys.argv[1]):
    if "config" in keywords:
        keywords["config"] = Config(*keywords["config"])
    kind, head_dim, capability = arguments
    resources = compile_kernel(kind, getattr(torch, dtype), head_dim, tuple(capability), **keywords)
    print(json.dumps(resources))
"""

SAMPLE = [
    ("bfloat16", ("forward", 64, (8, 0)), {"is_causal": True}),
    ("bfloat16", ("dq", 64, (8, 0)), {"is_causal": False}),
    ("float16", ("dk_dv", 64, (8, 0)), {"is_causal": True}),
    ("bfloat16", ("forward", 96, (9, 0)), {"is_causal": False}),
    ("bfloat16", ("dq", 128, (9, 0)), {"is_causal": True}),
    ("bfloat16", ("dk_dv", 128, (9, 0)), {"is_causal": True}),
    ("float32", ("forward", 64, (9, 0)), {"is_causal": True, "precision": "ieee"}),
    ("float32", ("dk_dv", 64, (9, 0)), {"is_causal": False, "precision": "tf32"}),
    ("bfloat16", ("forward", 64, (10, 0)), {"is_causal": True}),
]

# Masks, documents, orders and dropout cost registers; these compile, and may spill.
OPTIONS = [
    ("bfloat16", (kind, 64, (9, 0)), {"is_causal": True, "dropout": True, "with_options": True})
    for kind in ("forward", "dq", "dk_dv")
]


def compile_all(sample):
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", _CODE, json.dumps(sample)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    return [ahead_of_time.Resources(*json.loads(line)) for line in result.stdout.splitlines()]


def test_what_ships_does_not_spill():
    for (dtype, (kind, head_dim, capability), keywords), used in zip(
        SAMPLE, compile_all(SAMPLE), strict=True
    ):
        name = f"{kind} {dtype} {head_dim} {capability} {keywords}"
        assert used.spilled_bytes == 0, name
        assert 0 < used.registers <= 255, name
        limit = configs.SHARED_BYTES[configs.generation(capability)]
        assert 0 < used.shared_bytes <= limit, name


def test_every_option_compiles():
    assert len(compile_all(OPTIONS)) == 3


def test_the_reader_of_resources_sees_spills():
    """Tiles that do not fit: otherwise "no spills" would say nothing."""
    too_large = {"is_causal": True, "config": [128, 128, 4, 2]}
    (used,) = compile_all([("bfloat16", ("dk_dv", 128, (9, 0)), too_large)])
    assert used.spilled_bytes > 0


@pytest.mark.parametrize(
    ("capability", "generation"),
    [
        *[((7, 0), "ampere"), ((8, 0), "ampere"), ((8, 9), "ampere"), ((12, 0), "ampere")],
        *[((9, 0), "hopper"), ((10, 0), "blackwell"), ((10, 3), "blackwell")],
    ],
)
def test_generations(capability, generation):
    assert configs.generation(capability) == generation


@pytest.mark.parametrize("head_dim", [1, 16, 17, 48, 64, 96, 200, 256])
def test_every_call_has_a_configuration(head_dim):
    for capability in ((8, 0), (9, 0), (10, 0)):
        for kind in ("forward", "dq", "dk_dv"):
            for dtype, precision in (
                (torch.bfloat16, "tf32"),
                (torch.float32, "ieee"),
                (torch.float32, "tf32"),
            ):
                config = configs.tabled_config(kind, dtype, head_dim, capability, precision)
                assert config.block_m in (16, 32, 64, 128)
                assert config.block_n in (16, 32, 64, 128)


def test_tiles_are_no_longer_than_segments():
    arguments = ("forward", torch.bfloat16, 64, torch.device("cpu"))
    assert configs.choose_config(*arguments, 10**6, "tf32")[:2] == (128, 64)
    assert configs.choose_config(*arguments, 33, "tf32")[:2] == (64, 64)
    assert configs.choose_config(*arguments, 1, "tf32")[:2] == (16, 16)


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="compiled here")
def test_an_interpreter_compiles_nothing():
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        ahead_of_time.compile_kernel("forward", torch.float32, 64, (9, 0), is_causal=False)
