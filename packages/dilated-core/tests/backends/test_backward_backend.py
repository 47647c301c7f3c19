"""Backward runs the backend that forward took, whatever changes in the registry in between."""

from contextlib import nullcontext

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    available_backends,
    dilated_attention,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.registry import use_ranking
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

PATTERN = DilatedPattern([8, 20], [1, 3])


class Recording(EagerBackend):
    """`eager`, which writes down its calls; `shift` gives it dropout masks of its own."""

    priority = -1

    def __init__(self, name, shift):
        self.name, self.shift, self.calls = name, shift, []

    def forward(self, q, k, v, options):
        self.calls.append("forward")
        options = options._replace(dropout_seed=options.dropout_seed + self.shift)
        return super().forward(q, k, v, options)

    def backward(self, dout, q, k, v, out, lse, options, *, delta=None):
        self.calls.append("backward")
        options = options._replace(dropout_seed=options.dropout_seed + self.shift)
        return super().backward(dout, q, k, v, out, lse, options, delta=delta)


@pytest.fixture
def first():
    backend = Recording("first", 1000)
    register_backend(backend)
    yield backend
    use_ranking(None)
    for name in {"first", "second"} & set(available_backends()):
        unregister_backend(name)


def _rank_another(first):
    register_backend(Recording("second", 2000))
    use_ranking(lambda inputs: {"second": (99, "test"), "first": (-1, "test")})


def _unregister(first):
    unregister_backend("first")
    use_ranking(None)


def _replace(first):
    unregister_backend("first")
    register_backend(Recording("first", 3000))


CHANGES = [_rank_another, _unregister, _replace]


def _attend(q, k, v, *, backend="auto", dropout_p=0.5):
    return dilated_attention(q, k, v, PATTERN, dropout_p=dropout_p, backend=backend)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("way", ["plain", "dispatch mode", "mode in backward alone", "compiled"])
def test_nothing_changes_backward(first, way, change):
    use_ranking(lambda inputs: {"first": (50, "test")})
    if way == "compiled":
        torch._dynamo.reset()
    q, k, v = (torch.randn(1, 20, 3, 4, requires_grad=True) for _ in range(3))
    torch.manual_seed(0)
    expected = _attend(q, k, v, backend="first")
    dout = torch.randn(1, 20, 3, 4)
    want = torch.autograd.grad(expected, (q, k, v), dout)
    first.calls.clear()

    attend = torch.compile(_attend, backend="aot_eager") if way == "compiled" else _attend
    modes = {
        "dispatch mode": (FlopCounterMode(display=False), FlopCounterMode(display=False)),
        "mode in backward alone": (nullcontext(), FlopCounterMode(display=False)),
    }
    around_forward, around_backward = modes.get(way, (nullcontext(), nullcontext()))
    torch.manual_seed(0)
    with around_forward:
        out = attend(q, k, v)
    change(first)
    with around_backward:
        got = torch.autograd.grad(out, (q, k, v), dout)
    assert set(first.calls) == {"forward", "backward"}
    assert torch.equal(out, expected)
    # With the masks of another backend these would differ.
    assert all(torch.equal(a, e) for a, e in zip(got, want, strict=True))


def test_a_ranking_does_not_change_a_checkpointed_call_of_a_named_backend(first):
    q, k, v = (torch.randn(1, 20, 3, 4, requires_grad=True) for _ in range(3))
    results = []
    for change in (lambda first: None, _rank_another):
        torch.manual_seed(0)
        out = checkpoint(_attend, q, k, v, backend="first", use_reentrant=False)
        change(first)
        results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert first.calls.count("forward") == 2 * first.calls.count("backward")


def test_gradients_are_right_if_recomputation_chooses_another_backend(first):
    """Checkpointing calls attention again, which knows nothing of the first choice."""
    use_ranking(lambda inputs: {"first": (50, "test")})
    q, k, v = (torch.randn(1, 20, 3, 4, requires_grad=True) for _ in range(3))
    out = checkpoint(lambda *x: _attend(*x, dropout_p=0.0), q, k, v, use_reentrant=False)
    second = Recording("second", 2000)
    register_backend(second)
    use_ranking(lambda inputs: {"second": (99, "test")})
    got = torch.autograd.grad(out.sum(), (q, k, v))
    want = torch.autograd.grad(_attend(q, k, v, backend="eager", dropout_p=0.0).sum(), (q, k, v))
    assert "forward" in second.calls
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a, e)
