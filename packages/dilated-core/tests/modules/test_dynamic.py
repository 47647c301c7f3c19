"""`DynamicDilatedAttention` is the oracle over the branches that `select_segments` chooses."""

import copy
import pickle

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    DynamicDilatedAttention,
    dilated_attention,
    reference_dilated_attention,
)
from dilated_core.testing import relative_error


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seq_len", [1, 7, 16, 17, 50, 130])
def test_dynamic_attention_is_the_oracle(seq_len, is_causal):
    options = {"scale": 0.7, "head_offsets": "blocked", "padding": "attended"}
    module = DynamicDilatedAttention(first_segment_length=16, growth=3, **options)
    assert not list(module.parameters())
    q = torch.randn(2, seq_len, 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, seq_len, 2, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    lengths = [16] + [48] * (seq_len > 16) + [144] * (seq_len > 48)
    pattern = DilatedPattern(
        lengths, [1, 3, 9][: len(lengths)], head_offsets="blocked", padding="attended"
    )
    out = module(q, k, v, is_causal=is_causal)
    expected = reference_dilated_attention(q, k, v, pattern, is_causal=is_causal, scale=0.7)
    assert relative_error(out, expected) < 1e-12
    mask = torch.arange(seq_len).expand(2, -1) >= torch.tensor([[seq_len], [(seq_len + 1) // 2]])
    masked = module(q, k, v, is_causal=is_causal, key_padding_mask=mask)
    exact = reference_dilated_attention(
        q, k, v, pattern, is_causal=is_causal, scale=0.7, key_padding_mask=mask
    )
    assert relative_error(masked, exact) < 1e-12
    dout = torch.randn_like(out)
    for actual, exact in zip(
        torch.autograd.grad(out, (q, k, v), dout),
        torch.autograd.grad(expected, (q, k, v), dout),
        strict=True,
    ):
        assert relative_error(actual, exact) < 1e-11
    assert not list(module.modules())[1:]


def test_dynamic_attention_follows_its_budget_and_options():
    q = torch.randn(1, 40, 4, 8)
    module = DynamicDilatedAttention(
        first_segment_length=64, memory_budget=2 * 40 * 4 * 8 * 4 - 1, keep_every_position=True,
        dropout=0.5, backend="eager",
    )  # fmt: skip
    assert module.pattern_for(q, q).branches == ((8, 1), (16, 2), (32, 4), (64, 4))
    assert module.pattern_for(q.half(), q.half()).segment_lengths == (64,)
    assert not torch.equal(module(q, q, q), module(q, q, q))
    module.eval()
    expected = dilated_attention(
        q, q, q, DilatedPattern([8, 16, 32, 64], [1, 2, 4, 4]), backend="eager"
    )
    assert torch.equal(module(q, q, q), expected)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(q, q, q), expected)
    assert repr(module) == (
        "DynamicDilatedAttention(first_segment_length=64, growth=2, dropout=0.5, "
        "backend='eager', keep_every_position=True, memory_budget=10239)"
    )
    with pytest.raises(ValueError, match="memory_budget is 5 bytes; with 4 heads of 8 in"):
        DynamicDilatedAttention(memory_budget=5)(q, q, q)


def test_dynamic_attention_checks_at_construction():
    for options, error, message in (
        ({"growth": 1}, ValueError, "growth is 1"),
        ({"dropout": 1.0}, ValueError, "^dropout is 1.0"),
        ({"max_workspace_bytes": -1}, ValueError, "max_workspace_bytes is -1"),
        ({"padding": "zero"}, ValueError, "padding is 'zero'"),
        ({"memory_budget": "1GB"}, TypeError, "memory_budget is '1GB'; it must be an integer"),
        ({"keep_every_position": "no"}, TypeError, "keep_every_position is 'no'; it must be True"),
        ({"memory_budget": 0}, ValueError, "memory_budget is 0; it must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            DynamicDilatedAttention(**options)
    x = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match=r"q has shape \(4, 2, 8\); it must have the four"):
        DynamicDilatedAttention()(x, x, x)


def test_dynamic_attention_compiles_without_a_break():
    module = DynamicDilatedAttention(first_segment_length=8)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for seq_len in (7, 30, 31):
        q = torch.randn(1, seq_len, 2, 8)
        assert torch.equal(compiled(q, q, q), module(q, q, q))
