"""What the compiler makes of the decode kernels, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def found():
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_decode.py")
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_register_spills_in_a_loop(found):
    assert len(found["resources"]) == 12
    for row in found["resources"]:
        assert row["spills_in_loops"] == 0
        assert row["spilled_bytes"] <= 16


def test_shared_memory_and_registers_leave_room_for_two_programs(found):
    """So that one can load while the other computes; consumer GPUs have 99 KiB per program."""
    for row in found["resources"]:
        assert row["shared_bytes"] <= 99 * 2**10, row
        assert row["registers"] * (8 if row["dtype"] == "torch.float32" else 4) * 32 <= 2**15, row


def test_keys_and_values_are_loaded_sixteen_bytes_at_a_time(found):
    """Neighbouring channels are neighbours in memory, and the compiler must see it."""
    assert len(found["wide_loads"]) == 12
    for loads, loads_of_a_tile in found["wide_loads"]:
        assert loads >= loads_of_a_tile >= 2


def test_no_step_needs_another_compilation(found):
    """Few keys, whose result is final, or many, which are split; both below 2³¹ − 1 and above."""
    calls, kinds = found["specialisations"]["decode_kernel"]
    assert (calls, kinds) == (498, 4)
    calls, kinds = found["specialisations"]["merge_kernel"]
    assert calls > 400
    assert kinds == 1
