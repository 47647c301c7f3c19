"""The kernels compile for GPUs that are not here, without spills and within the shared memory.

A sample of what `python -m tools.kernel_resources` compiles.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import triton
from dilated_kernels.fused import configs

from tools import compile_ahead
from tools.compile_ahead import Resources
from tools.packages import ROOT

EVERYTHING = ["key_mask", "segments", "order", "blocked", "attended", "negative", "wide"]
# Alone, as the first of several branches or as the last: 0, 1 or 2.
SAMPLE = [
    ("float16", "forward", 64, (8, 0), 0, {"is_causal": True}),
    ("bfloat16", "dq", 128, (9, 0), 2, {"is_causal": True}),
    ("float32", "dk_dv", 64, (10, 0), 1, {"is_causal": False, "precision": "tf32"}),
    ("bfloat16", "delta", 96, (8, 0), 1, {"is_causal": False}),
    *[
        ("bfloat16", kind, 64, (9, 0), 2, {"is_causal": False, "options": EVERYTHING})
        for kind in ("forward", "dq", "dk_dv")
    ],
]
# Tiles too large and warps too many: otherwise "no spills" would prove nothing.
MISFITS = [
    ("bfloat16", "dk_dv", head_dim, capability, 0, {"is_causal": True, "config": config})
    for head_dim, capability, config in (
        (128, (9, 0), [128, 128, 4, 2]),
        (128, (9, 0), [64, 128, 16, 2]),
        (256, (10, 0), [32, 128, 8, 2]),
    )
]
# The tables were chosen with Triton 3.9; older ones keep a few registers more.
SPILLED_BYTES = 0 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 64


@pytest.fixture(scope="module")
def compiled():
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.tests.compile_sample", json.dumps([*SAMPLE, *MISFITS])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_what_ships_fits(compiled):
    for case, row in zip(SAMPLE, compiled["kernels"], strict=False):
        used = Resources(*row)
        assert used.spills_in_loops == 0, case
        assert used.spilled_bytes <= (SPILLED_BYTES if "wide" not in str(case) else 64), case
        assert not used.is_serialized, case
        assert 16 <= used.registers <= 255, case
        limit = configs.SHARED_BYTES[configs.generation(case[3])]
        assert 0 <= used.shared_bytes <= limit, case
        assert used.tensor_columns <= configs.TENSOR_COLUMNS, case


def test_what_does_not_fit_is_seen(compiled):
    spilling, serialized, trapping = (Resources(*row) for row in compiled["kernels"][-3:])
    assert spilling.spilled_bytes > 64
    assert spilling.spills_in_loops > 0
    assert serialized.is_serialized
    assert trapping.tensor_columns > configs.TENSOR_COLUMNS


def test_steps_leave_room_for_two_programs(compiled):
    """One program can then load while the other computes; consumer GPUs have 99 KiB each."""
    rows = compiled["steps"]["resources"]
    assert len(rows) == 4
    for row in rows:
        assert row["spills_in_loops"] == 0
        assert row["spilled_bytes"] <= 16
        assert row["shared_bytes"] <= 99 * 2**10, row
        assert row["registers"] * (8 if row["itemsize"] == 4 else 4) * 32 <= 2**15, row


def test_keys_and_values_are_loaded_sixteen_bytes_at_a_time(compiled):
    """Neighbouring channels are neighbours in memory, and the compiler must use it."""
    assert len(compiled["steps"]["wide_loads"]) == 4
    for loads, loads_of_a_tile in compiled["steps"]["wide_loads"]:
        assert loads >= loads_of_a_tile >= 2


def test_no_step_needs_another_compilation(compiled):
    """Few keys, whose result is final, or many, which are split; both below 2³¹ − 1 and above."""
    calls, kinds = compiled["steps"]["specialisations"]["decode"]
    assert (calls, kinds) == (201, 4)
    calls, kinds = compiled["steps"]["specialisations"]["merge"]
    assert calls > 100
    assert kinds == 1


def test_block_sparse_kernels_fit(compiled):
    rows = [Resources(*row) for row in compiled["blocks"]["resources"]]
    assert len(rows) == 6
    for used in rows:
        assert used.spills_in_loops == 0, used
        assert used.shared_bytes <= configs.SHARED_BYTES["ampere"], used


def test_no_length_and_no_list_compiles_block_sparse_kernels_again(compiled):
    assert compiled["blocks"]["specialisations"] == 3


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"unknown options \['causal'\]; there are key_mask, "):
        compile_ahead.compile_kernel(
            "dq", torch.float32, 64, (9, 0), is_causal=False, options=["causal"]
        )


def test_an_interpreter_compiles_nothing():
    code = (
        "import torch\n"
        "from tools.compile_ahead import compile_kernel\n"
        "compile_kernel('forward', torch.float32, 64, (9, 0), is_causal=False)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert "RuntimeError: Triton runs as an interpreter; unset TRITON_INTERPRET" in done.stderr
