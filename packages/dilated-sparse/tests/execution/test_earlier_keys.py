"""Backends that take no earlier keys in a causal call get the diagonal in calls of its own."""

from collections.abc import Iterator

import pytest
import torch
from dilated_core import register_backend, unregister_backend
from dilated_core.backends.contract import CONTRACT_VERSION
from dilated_core.backends.registry import get_backend
from dilated_sparse import (
    AdaptiveSparseAttention,
    block_sparse_attention_with_lse,
    pattern_of_type,
)
from oracle import dense_attention, position_mask


class Split:
    """Backend `eager` without its capabilities; causal calls are square."""

    name, priority, contract = "split", -1, CONTRACT_VERSION

    def __init__(self) -> None:
        self.causal_calls = 0
        self.inner = get_backend("eager")

    def why_not(self, inputs):
        return []

    def forward(self, q, k, v, options):
        self.check(q, k, options)
        return self.inner.forward(q, k, v, options)

    def backward(self, dout, q, k, v, out, lse, options, *, delta=None):
        self.check(q, k, options)
        return self.inner.backward(dout, q, k, v, out, lse, options, delta=delta)

    def check(self, q, k, options):
        if options.is_causal:
            assert q.shape[1] == k.shape[1]
            self.causal_calls += 1


@pytest.fixture
def split() -> Iterator[Split]:
    backend = Split()
    register_backend(backend)
    yield backend
    unregister_backend("split")


@pytest.mark.parametrize("backend", ["split", "eager", "sdpa"])
@pytest.mark.parametrize("S", [40, 37])
def test_causal_patterns_match_dense_attention(split: Split, backend: str, S: int) -> None:
    torch.manual_seed(S)
    q, k, v = (
        torch.randn(2, S, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    near, far = (
        pattern_of_type(kind, 10, sparsity_ratio=0.3, is_causal=True)
        for kind in ("local_window", "hierarchical")
    )
    pattern = near | far
    got = block_sparse_attention_with_lse(q, k, v, pattern, 4, True, backend=backend)
    exact = dense_attention(q, k, v, position_mask(pattern, S, 4, 4, is_causal=True))
    dout, dlse = torch.randn_like(exact[0]), torch.randn_like(exact[1])
    for a, b in zip(
        (*got, *torch.autograd.grad(got, (q, k, v), (dout, dlse))),
        (*exact, *torch.autograd.grad(exact, (q, k, v), (dout, dlse))),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert (split.causal_calls > 0) == (backend == "split")


@pytest.mark.parametrize("S", [40, 37])
def test_selections_are_the_same_attention_either_way(split: Split, S: int) -> None:
    torch.manual_seed(S)
    q, k, v, dout = (torch.randn(2, S, heads, 6, dtype=torch.float64) for heads in (4, 2, 2, 4))
    results = []
    for backend in ("split", "eager", "sdpa"):
        attention = AdaptiveSparseAttention(
            num_heads=4, num_kv_heads=2, head_dim=6, block_size=4, sparsity_ratio=0.5,
            distillation="none", backend=backend, dtype=torch.float64,
        )  # fmt: skip
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, is_causal=True)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert split.causal_calls > 0
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)
