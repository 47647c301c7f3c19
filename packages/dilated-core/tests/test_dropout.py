"""Dropout of attention probabilities: by seed, branch, batch row, head and positions alone."""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.dropout import dropped, key_numbers, query_numbers
from dilated_core.testing.dropout import attention_with_dropout
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

PATTERN = DilatedPattern([8, 20], [1, 3])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 20),
    st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    st.lists(st.tuples(st.integers(1, 25), st.integers(1, 6)), min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from(["masked", "attended"]),
    st.integers(0, 2**32),
)
def test_the_positions_decide(seq_len, heads, branches, is_causal, padding, seed):
    """Against dense attention whose masks are computed from positions, number by number."""
    pattern = DilatedPattern(*zip(*branches, strict=True), padding=padding)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (
        torch.randn(2, seq_len, h, 4, dtype=torch.float64, generator=generator)
        for h in (heads[0], heads[1], heads[1], heads[0])
    )
    tensors = [x.requires_grad_() for x in (q, k, v)]
    torch.manual_seed(seed)
    out = dilated_attention(*tensors, pattern, is_causal=is_causal, dropout_p=0.4)
    torch.manual_seed(seed)
    expected = attention_with_dropout(*tensors, pattern, is_causal=is_causal, dropout_p=0.4)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    grads, want = (torch.autograd.grad(x, tensors, dout) for x in (out, expected))
    for a, e in zip(grads, want, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
def test_workspace_strides_and_ranges_of_heads_change_nothing(is_causal):
    pattern = DilatedPattern([8, 16], [1, 4])
    q, k, v = torch.randn(3, 2, 32, 6, 4, dtype=torch.float64).unbind()

    def attend(q, k, v, **options):
        torch.manual_seed(9)
        return dilated_attention(q, k, v, pattern, is_causal=is_causal, dropout_p=0.3, **options)

    whole = attend(q, k, v)
    with pytest.raises(ValueError, match="need at least") as error:
        attend(q, k, v, max_workspace_bytes=1)
    least = int(str(error.value).split()[-1].strip("."))
    torch.testing.assert_close(attend(q, k, v, max_workspace_bytes=least), whole)
    strided = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(attend(*strided), whole)
    heads = slice(2, 5)
    some = (x[:, :, heads] for x in (q, k, v))
    torch.testing.assert_close(attend(*some, head_range=(2, 6)), whole[:, :, heads])


def test_numbers_look_independent():
    """Every pair of neighbours in a row, a column, a head and a branch: a table of four counts."""
    size, p, numbers = 256, 0.3, torch.device("cpu")
    queries = query_numbers(7, 8, 0, size, numbers)
    keys = key_numbers(7, 8, 0, size, numbers)
    drop = dropped(queries, keys, p)
    n = drop.numel()
    assert abs(drop.double().mean() - p) < 5 * (p * (1 - p) / n) ** 0.5
    other_seed = dropped(query_numbers(8, 8, 0, size, numbers), keys, p)
    pairs = {
        "queries": (drop[:, 1:], drop[:, :-1]),
        "keys": (drop[..., 1:], drop[..., :-1]),
        "batch rows": (drop[1:], drop[:-1]),
        "diagonal": (drop[:, 1:, 1:], drop[:, :-1, :-1]),
        "query and key": (drop, drop.mT),
        "seeds": (drop, other_seed),
        "branches": (drop, dropped(queries + 12345, keys, p)),
    }
    for name, (a, b) in pairs.items():
        both = (a & b).double().mean().item()
        spread = (p**2 * (1 - p**2) / a.numel()) ** 0.5
        assert abs(both - p**2) < 5 * spread, name


def _probabilities(dropout_p, *, seed=0, is_causal=False):
    """What attention makes of the unit vectors as values: its probabilities, (H, S, S)."""
    torch.manual_seed(1)
    q, k = torch.randn(2, 1, 20, 3, 20, dtype=torch.float64).unbind()
    v = torch.eye(20, dtype=torch.float64)[None, :, None].expand(1, 20, 3, 20)
    torch.manual_seed(seed)
    out = dilated_attention(q, k, v, PATTERN, is_causal=is_causal, dropout_p=dropout_p)
    return out[0].transpose(0, 1)


def test_each_key_of_each_branch_is_kept_and_scaled_or_dropped():
    p, dropped = _probabilities(0.0), _probabilities(0.25)
    counts = PATTERN.materialize(20, 3)
    # A key counted c times keeps 0 to c of its equal shares, each scaled by 1/0.75.
    shares = (dropped * 0.75 / p)[counts > 0] * counts[counts > 0]
    torch.testing.assert_close(shares, shares.round(), rtol=0, atol=1e-9)
    assert (dropped[counts == 0] == 0).all()
    kept = shares.sum() / counts.sum()
    assert kept.item() == pytest.approx(0.75, abs=0.05)


def test_unbiased():
    draws = torch.stack([_probabilities(0.3, seed=seed) for seed in range(1000)])
    error = draws.mean(0) - _probabilities(0.0)
    spread = draws.std(0) / 1000**0.5
    assert (error.abs() <= 6 * spread + 1e-12).all()


def test_the_seed_decides():
    assert torch.equal(_probabilities(0.5, seed=3), _probabilities(0.5, seed=3))
    assert not torch.equal(_probabilities(0.5, seed=3), _probabilities(0.5, seed=4))


def test_causal_dropout_sees_no_future():
    assert (_probabilities(0.5, is_causal=True).triu(1) == 0).all()


@pytest.mark.parametrize("pattern", [PATTERN, DilatedPattern([5, 6], [2, 1], padding="attended")])
def test_backward_drops_what_forward_dropped(pattern):
    tensors = [torch.randn(2, 7, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attend(q, k, v):
        torch.manual_seed(5)
        return dilated_attention(q, k, v, pattern, dropout_p=0.4)

    assert torch.autograd.gradcheck(attend, tensors)
    # A gradient whose layout is not that of the output must not change which rows meet which seed.
    out = attend(*tensors)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, tensors, dout)
    out = attend(*tensors)
    other_layout = dout.transpose(0, 1).contiguous().transpose(0, 1)
    got = torch.autograd.grad(out, tensors, other_layout)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_recomputation_drops_the_same():
    q, k, v = (torch.randn(1, 20, 3, 4, requires_grad=True) for _ in range(3))
    results = []
    for attend in (
        lambda *x: dilated_attention(*x, PATTERN, dropout_p=0.5),
        lambda *x: checkpoint(
            lambda *y: dilated_attention(*y, PATTERN, dropout_p=0.5), *x, use_reentrant=False
        ),
    ):
        torch.manual_seed(0)
        out = attend(q, k, v)
        results.append(torch.autograd.grad(out, (q, k, v), torch.ones_like(out)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_calls_draw_anew():
    compiled = torch.compile(
        lambda q, k, v: dilated_attention(q, k, v, PATTERN, dropout_p=0.5),
        fullgraph=True,
        backend="aot_eager",
    )
    q, k, v = torch.randn(3, 1, 20, 3, 4).unbind()
    torch.manual_seed(0)
    first, second = compiled(q, k, v), compiled(q, k, v)
    torch.manual_seed(0)
    assert not torch.equal(first, second)
    assert torch.equal(compiled(q, k, v), first)
