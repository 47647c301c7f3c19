"""Packed documents: many short ones are few calls of a backend, and empty ones are ordinary."""

from itertools import pairwise

import pytest
import torch
from dilated_core import (
    DilatedAttention,
    DilatedPattern,
    MultiheadDilatedAttention,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.eager import EagerBackend
from dilated_core.testing import relative_error

PATTERN = DilatedPattern([4, 7], [1, 2])
EMPTY = [[0, 3, 3, 10], [0, 0], [0, 0, 0, 0], [0, 0, 5], [0, 5, 5, 5]]


class Counting(EagerBackend):
    name, priority = "counting", -1
    num_calls = 0

    def forward(self, *arguments):
        self.num_calls += 1
        return super().forward(*arguments)

    def backward(self, *arguments, **options):
        self.num_calls += 1
        return super().backward(*arguments, **options)


@pytest.fixture
def counting():
    backend = Counting()
    register_backend(backend)
    yield backend
    unregister_backend("counting")


def _bounds(lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])


def _tensors(num_positions, kv_heads=2):
    return [
        torch.randn(num_positions, heads, 4, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    ]


def test_calls_grow_with_lengths_and_branches_and_not_with_documents(counting):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 8, (20_000,), generator=generator)
    bounds = _bounds(lengths)
    q, k, v = _tensors(int(bounds[-1]))
    out = dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds, backend="counting")
    forward = counting.num_calls
    out.sum().backward()
    assert forward <= 7 * 2 * 4  # lengths, branches, views of a branch
    assert counting.num_calls == 2 * forward
    # Some documents alone, and the first and the last one.
    for i in (0, 1, 2, 777, 12_345, 19_999):
        rows = slice(int(bounds[i]), int(bounds[i + 1]))
        alone = [x.detach()[None, rows].requires_grad_() for x in (q, k, v)]
        expected = dilated_attention(*alone, PATTERN, backend="eager")
        assert relative_error(out[rows], expected[0]) < 1e-13
        wanted = torch.autograd.grad(expected.sum(), alone)
        for x, want in zip((q, k, v), wanted, strict=True):
            assert (x.grad[rows] - want[0]).abs().max() < 1e-12


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("bounds", EMPTY, ids=str)
@pytest.mark.parametrize("limit", [None, 10_000])
def test_empty_documents(bounds, backend, limit):
    q, k, v = _tensors(bounds[-1])
    for is_causal in (False, True):
        call = {"is_causal": is_causal, "cu_seqlens": torch.tensor(bounds)}
        got = dilated_attention_with_lse(
            q, k, v, PATTERN, **call, backend=backend, max_workspace_bytes=limit
        )
        want = reference_dilated_attention_with_lse(q, k, v, PATTERN, **call)
        grads = torch.autograd.grad((got.out.sum() + got.lse.sum()), (q, k, v))
        wanted = torch.autograd.grad((want.out.sum() + want.lse.sum()), (q, k, v))
        for a, e in zip((*got, *grads), (*want, *wanted), strict=True):
            assert a.shape == e.shape
            assert relative_error(a, e) < 1e-12


def test_an_empty_document_changes_no_other():
    q, k, v = _tensors(10)
    with_empty, without = (torch.tensor(b) for b in ([0, 0, 3, 3, 3, 10, 10], [0, 3, 10]))
    for options in ({}, {"dropout_p": 0.4}):
        results = []
        for bounds in (with_empty, without):
            torch.manual_seed(0)
            out = dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds, **options)
            results.append([out, *torch.autograd.grad(out.sum(), (q, k, v))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("bounds", EMPTY, ids=str)
def test_modules_take_empty_documents(bounds):
    branches = {"segment_lengths": [4, 7], "dilation_rates": [1, 2]}
    cu_seqlens = torch.tensor(bounds)
    attention = DilatedAttention(**branches)
    q, k, v = _tensors(bounds[-1])
    out = attention(q, k, v, cu_seqlens=cu_seqlens)
    assert torch.equal(out, dilated_attention(q, k, v, PATTERN, cu_seqlens=cu_seqlens))
    torch.manual_seed(0)
    layer = MultiheadDilatedAttention(8, 4, **branches).double()
    x = torch.randn(bounds[-1], 8, dtype=torch.float64, requires_grad=True)
    y = layer(x, x, x, cu_seqlens=cu_seqlens)
    y.sum().backward()
    assert x.grad.shape == x.shape
    for a, b in pairwise(bounds):
        if a < b:
            alone = layer(*[x[None, a:b]] * 3)[0]
            assert relative_error(y[a:b], alone) < 1e-12


def test_documents_within_a_limit_equal_those_without():
    lengths = torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(1))
    bounds = _bounds(lengths)
    q, k, v = _tensors(int(bounds[-1]))
    whole = dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds)
    with pytest.raises(ValueError, match="need at least") as error:
        dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds, max_workspace_bytes=1)
    smallest = int(str(error.value).split()[-1].rstrip("."))
    for limit in (smallest, 3 * smallest, 100 * smallest):
        again = dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds, max_workspace_bytes=limit)
        assert relative_error(again, whole) < 1e-13


def test_dropout_is_reproducible_and_not_that_of_another_seed():
    bounds = _bounds(torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(2)))
    q, k, v = _tensors(int(bounds[-1]))
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(dilated_attention(q, k, v, PATTERN, cu_seqlens=bounds, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
