"""Decoding token by token beside one causal call over all tokens."""

import pytest
import torch
from dilated_sparse import AdaptiveCache, AdaptiveSparseAttention

TOPK, MASS, RATIO = {"topk": 3}, {"mass": 0.5}, {"sparsity_ratio": 0.4}


def module(**options) -> AdaptiveSparseAttention:
    attention = AdaptiveSparseAttention(
        num_heads=4, head_dim=8, num_kv_heads=2, block_size=4, sub_block_size=2, sink_blocks=0,
        local_blocks=0, **options,
    )  # fmt: skip
    torch.manual_seed(1)
    for weight in attention.gate.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return attention


def tensors(S: int) -> list[torch.Tensor]:
    torch.manual_seed(S)
    shapes = [(2, S, heads, 8) for heads in (4, 2, 2, 4, 2)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def decoded(attention: AdaptiveSparseAttention, parts: list[int], xs: list[torch.Tensor]):
    cache, outs, start = AdaptiveCache(), [], 0
    for number in parts:
        q, k, v, q0, k0 = (x[:, start : start + number] for x in xs)
        outs.append(attention.decode(q, k, v, cache, unrotated=(q0, k0)))
        start += number
    assert cache.length == sum(parts)
    return torch.cat(outs, 1)


@pytest.mark.parametrize(
    ("budget", "parts"),
    [(TOPK, [1] * 31), (MASS, [9] + [1] * 22), (RATIO, [12, 7, 1, 11]), (MASS, [31])],
)
def test_every_step_is_the_row_of_a_causal_call(budget: dict, parts: list[int]) -> None:
    xs = tensors(31)
    attention = module(**budget).eval()
    expected = attention(*xs[:3], is_causal=True, unrotated=(xs[3], xs[4]))
    torch.testing.assert_close(decoded(attention, parts, xs), expected)


@pytest.mark.parametrize(("budget", "first"), [(TOPK, 1), (MASS, 9), (RATIO, 9)])
def test_with_lookahead_the_last_token_of_a_block_selects_as_the_block(budget, first: int) -> None:
    xs = tensors(32)
    attention = module(lookahead=True, **budget).eval()
    expected = attention(*xs[:3], is_causal=True, unrotated=(xs[3], xs[4]))
    out = decoded(attention, [first] + [1] * (32 - first), xs)
    torch.testing.assert_close(out[:, 3::4], expected[:, 3::4])
    assert not torch.allclose(out, expected)
    # Each step equals the last row of a call over the tokens so far; 3 meets each place of a block.
    for t in range(first, 32, 3):
        so_far = attention(*(x[:, : t + 1] for x in xs[:3]), is_causal=True,
                           unrotated=(xs[3][:, : t + 1], xs[4][:, : t + 1]))  # fmt: skip
        torch.testing.assert_close(out[:, t], so_far[:, -1])


def test_wrong_caches_are_refused() -> None:
    q, k, v, *_ = tensors(5)
    attention, cache = module(topk=2), AdaptiveCache()
    attention.decode(q, k, v, cache)
    with pytest.raises(ValueError, match="the cache holds"):
        attention.decode(q[:1], k[:1], v[:1], cache)
    with pytest.raises(TypeError, match="cache is a NoneType"):
        attention.decode(q, k, v, None)
    with pytest.raises(ValueError, match="gate_gradient is 'bias'"):
        module(gate_gradient="bias").decode(q, k, v, AdaptiveCache())
