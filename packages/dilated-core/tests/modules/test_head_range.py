"""Heads spread over devices: a module with `head_range` computes its slice of the whole."""

import pytest
import torch
from dilated_core import (
    DilatedAttention,
    DilatedAttentionConfig,
    DynamicDilatedAttention,
    MultiheadDilatedAttention,
)
from dilated_core.testing import relative_error
from torch import nn

PARTS = [(0, 3), (3, 6), (6, 12)]


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize(
    ("module", "options"),
    [
        (DilatedAttention, {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}),
        # The rates stop at the number of all heads, and the budget is that of all heads.
        (DynamicDilatedAttention, {"first_segment_length": 4, "keep_every_position": True}),
        (DynamicDilatedAttention, {"first_segment_length": 16, "memory_budget": 2 * 20 * 4 * 64}),
    ],
)
def test_a_part_is_the_slice_of_the_whole(module, options, head_offsets):
    q = torch.randn(2, 50, 12, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, 50, 4, 8, dtype=torch.float64).unbind()
    options = options | {"head_offsets": head_offsets}
    whole = module(**options)(q, k, v, is_causal=True)
    for first, stop in PARTS:
        heads, kv_heads = slice(first, stop), slice(first // 3, stop // 3)
        part = module(**options, head_range=(first, 12))
        out = part(q[:, :, heads], k[:, :, kv_heads], v[:, :, kv_heads], is_causal=True)
        assert relative_error(out, whole[:, :, heads]) < 1e-13


def test_projections_split_by_heads_add_up_to_the_whole():
    """As tensor parallelism splits them: columns of q, k and v, rows of the output projection."""
    options = {"segment_lengths": [8, 32], "dilation_rates": [1, 4], "bias": False}
    options |= {"layer_norm": False, "dtype": torch.float64}
    whole = MultiheadDilatedAttention(24, 12, **options)
    x = torch.randn(2, 50, 24, dtype=torch.float64)
    y = torch.zeros_like(x)
    for first, stop in PARTS:
        part = MultiheadDilatedAttention(24, 12, **options, head_range=(first, 12))
        rows = slice(2 * first, 2 * stop)
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(whole, name).weight.detach()[rows]
            getattr(part, name).weight = nn.Parameter(weight)
        part.out_proj.weight = nn.Parameter(whole.out_proj.weight.detach()[:, rows])
        y += part(x, x, x)
    assert relative_error(y, whole(x, x, x)) < 1e-13


def test_mistakes():
    for build in (
        lambda: DilatedAttention([8], [1], head_range=(12, 12)),
        lambda: DilatedAttentionConfig(head_range=(12, 12)),
    ):
        with pytest.raises(ValueError, match=r"head_range is \(12, 12\) and there are 1 heads"):
            build()
    with pytest.raises(TypeError, match="head_range is 6; it must be a pair"):
        DynamicDilatedAttention(head_range=6)
    q = torch.randn(1, 10, 4, 8)
    for module in (
        DilatedAttention([8], [1], head_range=(2, 5)),
        DynamicDilatedAttention(head_range=(2, 5)),
    ):
        with pytest.raises(ValueError, match=r"head_range is \(2, 5\) and there are 4 heads"):
            module(q, q, q)
