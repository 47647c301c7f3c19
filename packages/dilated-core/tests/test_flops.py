"""`FlopCounterMode` counts attention by the pattern."""

import subprocess
import sys

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4], head_offsets="blocked")


def _tensors(*shape, kv_heads=None, device="cpu"):
    *rows, H, D = shape
    heads = (H, kv_heads or H, kv_heads or H)
    return [torch.randn(*rows, h, D, device=device, requires_grad=True) for h in heads]


def _counted(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_forward_and_backward_are_those_of_the_pattern(device, is_causal):
    q, k, v = _tensors(2, 50, 4, 8, kv_heads=2, device=device)
    forward, out = _counted(lambda: dilated_attention(q, k, v, PATTERN, is_causal=is_causal))
    assert forward == PATTERN.flops(50, 4, 8, batch_size=2, is_causal=is_causal)
    backward, _ = _counted(out.sum().backward)
    assert backward == 2.5 * forward
    # A backward whose forward no counter saw is counted, too.
    out = dilated_attention(q, k, v, PATTERN, is_causal=is_causal)
    assert _counted(out.sum().backward)[0] == backward


def test_packed_documents_count_one_by_one():
    q, k, v = _tensors(33, 4, 8)
    bounds = torch.tensor([0, 20, 20, 21, 33])
    got, _ = _counted(lambda: dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds))
    assert got == sum(PATTERN.flops(length, 4, 8) for length in (20, 1, 12))


def test_ranges_of_heads_count_to_the_whole():
    q, k, v = _tensors(1, 50, 6, 8)
    whole, _ = _counted(lambda: dilated_attention(q, k, v, PATTERN))
    parts = [
        _counted(
            lambda some=some: dilated_attention(
                *(x[:, :, some] for x in (q, k, v)), PATTERN, head_range=(some.start, 6)
            )
        )[0]
        for some in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(parts) == whole
    assert len({part / n for part, n in zip(parts, (1, 3, 2), strict=True)}) > 1


def test_a_dense_pattern_counts_as_pytorchs_attention():
    q, k, v = _tensors(2, 50, 4, 8)
    transposed = [x.transpose(1, 2) for x in (q, k, v)]
    dense, expected = DilatedPattern([50], [1]), []
    for attend in (
        lambda: dilated_attention(q, k, v, dense),
        lambda: scaled_dot_product_attention(*transposed),
    ):
        forward, out = _counted(attend)
        expected.append((forward, _counted(out.sum().backward)[0]))
    assert expected[0] == expected[1]


def test_checkpointing_counts_the_second_forward():
    q, k, v = _tensors(1, 50, 4, 8)
    once = PATTERN.flops(50, 4, 8)
    total, _ = _counted(
        lambda: (
            checkpoint(dilated_attention, q, k, v, PATTERN, use_reentrant=False).sum().backward()
        )
    )
    assert total == 2 * once + 2.5 * once


_FIRST_CALL = """
import torch
from dilated_core import DilatedPattern, dilated_attention
pattern = DilatedPattern([8, 16], [1, 2])
q = torch.randn(1, 20, 2, 4, requires_grad=True)
out = dilated_attention(q, q, q, pattern)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    {call}
assert counter.get_total_flops() == {factor} * pattern.flops(20, 2, 4), counter.get_total_flops()
"""


@pytest.mark.parametrize(
    ("call", "factor"), [("dilated_attention(q, q, q, pattern)", 1), ("out.sum().backward()", 2.5)]
)
def test_the_first_call_of_a_process_is_counted(call, factor):
    code = _FIRST_CALL.format(call=call, factor=factor)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
