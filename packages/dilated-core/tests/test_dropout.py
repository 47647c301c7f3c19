"""Dropout of attention probabilities."""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention
from torch.utils.checkpoint import checkpoint

PATTERN = DilatedPattern([8, 20], [1, 3])


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
    draws = torch.stack([_probabilities(0.3, seed=seed) for seed in range(2000)])
    error = draws.mean(0) - _probabilities(0.0)
    spread = draws.std(0) / 2000**0.5
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
