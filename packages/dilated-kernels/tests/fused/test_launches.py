"""Launches are values: what each kernel is launched with, read without running one."""

import inspect

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_kernels.fused import attention
from dilated_kernels.fused.attention import Accumulation, Options, make_call
from dilated_kernels.fused.branches import place_branches
from dilated_kernels.fused.tuning import Tuning

PLAIN = Options(True, 0.1, 0.0, 0, None, None)
EVERYTHING = Options(
    True, -0.1, 0.1, 7, torch.zeros(1, 1024, dtype=torch.bool), torch.tensor([0, 1024])
)
FIRST_AND_LAST = DilatedPattern([256, 512], [1, 2])


HOPPER = Tuning((9, 0), "tf32")


def launches(pattern, options=PLAIN, tuning=HOPPER):
    """By kernel, the launches of forward and backward; arguments by their names."""
    q, dout = torch.zeros(2, 1, 1024, 4, 64, dtype=torch.bfloat16)
    k, v = torch.zeros(2, 1, 1024, 2, 64, dtype=torch.bfloat16)
    lse, row_values = torch.zeros(1, 1024, 4), torch.zeros(1, 1024, 4, 2)
    call = make_call(q, k, v, pattern, options, tuning)
    out, dq, dk, dv = (
        Accumulation(x, call.branches, is_read_unwritten=False) for x in (q, q, k, v)
    )
    made = {
        "forward": attention.forward_launches(call, out, lse),
        "dq": attention.dq_launches(call, dout, row_values, dq),
        "dk_dv": attention.dk_dv_launches(call, dout, row_values, dk, dv),
    }
    named = {}
    for kind, values in made.items():
        named[kind] = []
        for launch in values:
            names = inspect.signature(launch.kernel.fn).parameters
            arguments = dict(zip(names, launch.arguments, strict=False))
            missing = set(names) - set(arguments) - set(launch.constants)
            assert not missing
            named[kind].append((arguments, launch.constants, launch.grid))
    return named


@pytest.mark.parametrize(
    ("kind", "partial", "result"),
    [("forward", "partial", "out"), ("dq", "partial", "dq"), ("dk_dv", "dk_partial", "dk")],
)
def test_the_first_launch_reads_no_partial_result_and_the_last_writes_the_dtype(
    kind, partial, result
):
    found = [
        (arguments[partial] is not None, arguments[result].dtype)
        for pattern in (DilatedPattern([256], [1]), FIRST_AND_LAST)
        for arguments, _, _ in launches(pattern)[kind]
    ]
    assert found == [(False, torch.bfloat16), (False, torch.float32), (True, torch.bfloat16)]


@pytest.mark.parametrize("kind", ["forward", "dq", "dk_dv"])
def test_options_reach_the_kernels(kind):
    blocked = DilatedPattern(
        FIRST_AND_LAST.segment_lengths, FIRST_AND_LAST.dilation_rates,
        head_offsets="blocked", padding="attended",
    )  # fmt: skip
    tuning = Tuning((9, 0), "tf32", tile_order="hilbert", is_wide=True)
    for is_given, made in (
        (False, launches(FIRST_AND_LAST)),
        (True, launches(blocked, EVERYTHING, tuning)),
    ):
        for arguments, constants, _ in made[kind]:
            for name in ("key_mask", "segments", "order"):
                assert (arguments[name] is not None) == is_given
            flags = {"HAS_DROPOUT", "BLOCKED", "WIDE"} | ({"ATTENDED"} & set(constants))
            assert all(constants[name] is is_given for name in flags)
            assert constants.get("POSITIVE_SCALE", not is_given) is not is_given
            assert constants["PRECISION"] == "tf32"
            assert constants["IS_CAUSAL"] is True
            assert arguments["seed"] == (7 if is_given else 0)


def test_programs_are_one_per_tile_head_and_batch_row():
    (arguments, constants, grid), _ = launches(FIRST_AND_LAST)["forward"]
    assert (arguments["segment_length"], arguments["rate"]) == (512, 2)
    tiles = 256 // constants["BLOCK_M"]
    assert (arguments["tiles"], arguments["cells"], grid) == (tiles, 2 * tiles, (2 * tiles * 4,))


def test_the_order_of_launches_is_dilated_first():
    pattern = DilatedPattern([8, 32, 16, 8], [1, 4, 2, 1])
    placed = place_branches(pattern, 40, None)
    assert [(branch.number, branch.rate) for branch in placed] == [(1, 4), (2, 2), (0, 1), (3, 1)]
