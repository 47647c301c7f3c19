"""The plan: each (branch, query, key) that the pattern allows is in exactly one problem."""

from itertools import pairwise

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.pattern.branches import head_offset
from dilated_core.strips.plan import Span, plan_problems
from dilated_core.testing import random_cases
from hypothesis import given, settings
from hypothesis import strategies as st


def _plan(pattern, B, S, H, **options):
    whole = Span(0, S)
    return plan_problems(
        pattern, queries=whole, keys=whole, seq_len=S, num_heads=H, batch_size=B, **options
    )


@settings(max_examples=200, deadline=None)
@given(case=random_cases(), is_contiguous=st.booleans())
def test_problems_visit_each_kept_row_once_per_branch(case, is_contiguous):
    """Counting visits through the views gives, per position and head, the branches that keep it."""
    B, S, H = case.batch_size, case.seq_len, case.num_heads
    visits = torch.zeros(B, S, H, 1, dtype=torch.int64)
    if not is_contiguous:
        visits = torch.zeros(S, H, B, 1, dtype=torch.int64).permute(2, 0, 1, 3)
    dense = visits.stride(0) == S * visits.stride(1)
    for problem in _plan(case.pattern, B, S, H, is_batch_dense=dense):
        view = problem.queries.view(visits)
        assert view.numel() == problem.queries.num_elements
        view += 1
    kept = torch.zeros(S, H, dtype=torch.int64)
    for w, r in case.pattern.branches:
        kept += DilatedPattern(
            [w], [r], head_offsets=case.pattern.head_offsets
        ).materialize(S, H).diagonal(dim1=1, dim2=2).T  # a kept row sees itself  # fmt: skip
    assert torch.equal(visits[..., 0], kept.expand(B, S, H))


def _counts(problems, queries, keys, H, K):
    """How often each query sees each key, and how many zero keys, by following the views."""
    counts = torch.zeros(H, queries.length, keys.length, dtype=torch.int64)
    zero_keys = torch.zeros(queries.length, H, dtype=torch.int64)
    rows = torch.arange(queries.length * H).view(1, queries.length, H)
    key_rows = torch.arange(keys.length * K).view(1, keys.length, K)
    for problem in problems:
        view = problem.queries.view(rows)
        zero_keys.flatten()[view.flatten()] += problem.zero_keys
        if problem.keys.num_rows == 0:
            continue
        key_view = problem.keys.view(key_rows).repeat_interleave(
            view.shape[2] // problem.keys.num_heads, 2
        )
        for q, k in zip(view.mT.flatten(0, 1), key_view.mT.flatten(0, 1), strict=True):
            heads, kv_heads = set((q % H).tolist()), set((k % K).tolist())
            assert len(heads) == 1
            assert kv_heads == {head * K // H for head in heads}
            sees = torch.ones(len(q), len(k), dtype=torch.int64)
            if problem.is_causal:
                assert len(q) == len(k)
                sees = sees.tril()
            counts[heads.pop(), (q // H)[:, None], (k // K)[None, :]] += sees
    return counts, zero_keys


def _zero_keys(pattern, S, H):
    counts = torch.zeros(S, H, dtype=torch.int64)
    for w, r in pattern.branches:
        w = min(w, S)
        for h in range(H):
            offset = head_offset(h, r, H, pattern.head_offsets)
            for position in range(S):
                start = position // w * w
                kept = range(start + offset, min(start + w, S), r)
                if position in kept:
                    counts[position, h] += -(-w // r) - len(kept)
    return counts


@st.composite
def _cuts(draw, S):
    """A way to cut 0 … S into spans."""
    inside = draw(st.lists(st.integers(1, max(1, S - 1)), max_size=3))
    bounds = sorted({0, S, *(min(cut, S) for cut in inside)})
    return [Span(a, b) for a, b in pairwise(bounds)]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), case=random_cases(max_seq_len=40))
def test_spans_of_any_cut_see_together_what_the_whole_sees(data, case):
    """Queries of every shard over keys of every other: the dense counts, each once."""
    S, H, K = case.seq_len, case.num_heads, case.num_kv_heads
    query_spans, key_spans = data.draw(_cuts(S)), data.draw(_cuts(S))
    expected = case.pattern.materialize(S, H, is_causal=case.is_causal)
    counts, zero_keys = torch.zeros_like(expected), torch.zeros(S, H, dtype=torch.int64)
    for queries in query_spans:
        for keys in key_spans:
            problems = plan_problems(
                case.pattern,
                queries=queries,
                keys=keys,
                seq_len=S,
                num_heads=H,
                num_kv_heads=K,
                is_causal=case.is_causal,
            )
            if case.is_causal and queries.stop <= keys.start:
                assert problems == ()  # an empty plan: the hop can be skipped
            part, zeros = _counts(problems, queries, keys, H, K)
            counts[:, slice(*queries), slice(*keys)] += part
            zero_keys[slice(*queries)] += zeros
    assert torch.equal(counts, expected)
    has_zero_keys = case.pattern.padding == "attended" and not case.is_causal
    assert torch.equal(zero_keys, _zero_keys(case.pattern, S, H) * has_zero_keys)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), case=random_cases(max_seq_len=40))
def test_some_heads_have_the_rows_they_have_among_all(data, case):
    S, H = case.seq_len, case.num_heads
    first = data.draw(st.integers(0, H - 1))
    count = data.draw(st.integers(1, H - first))
    problems = _plan(case.pattern, 1, S, count, head_range=(first, H))
    counts, _ = _counts(problems, Span(0, S), Span(0, S), count, count)
    assert torch.equal(counts, case.pattern.materialize(S, H)[first : first + count])


def test_few_views_suffice():
    """min(r, ⌈H/r⌉) views per branch when r divides w: five for the usual pattern of 8 heads."""
    pattern = DilatedPattern([64, 128, 256, 512], [1, 2, 4, 8])
    assert len(_plan(pattern, 3, 1024, 8, is_batch_dense=True)) == 1 + 2 + 2 + 1
    blocked = DilatedPattern([64, 128, 256, 512], [1, 2, 4, 8], head_offsets="blocked")
    assert len(_plan(blocked, 3, 1024, 8, is_batch_dense=True)) == 1 + 2 + 2 + 1


def test_a_causal_rectangle_is_a_whole_and_a_square():
    """A shard whose keys begin before its queries: what came before is seen as a whole."""
    pattern = DilatedPattern([100], [1])
    queries, keys = Span(40, 70), Span(20, 60)
    problems = plan_problems(
        pattern, queries=queries, keys=keys, seq_len=100, num_heads=1, is_causal=True
    )
    assert [(p.queries.num_rows, p.keys.num_rows, p.is_causal) for p in problems] == [
        (30, 20, False),  # 40 … 69 over 20 … 39
        (20, 20, True),  # 40 … 59 over themselves
        (10, 20, False),  # 60 … 69 over 40 … 59
    ]


def test_undilated_branches_come_first():
    problems = _plan(DilatedPattern([64, 16], [4, 1]), 1, 64, 8)
    assert [problem.queries.rate for problem in problems] == [1, 4, 4]
    assert [problem.is_first for problem in problems] == [True, False, False]


@pytest.mark.parametrize("large", [2**63, 2**100])
def test_lengths_and_rates_beyond_64_bits(large):
    x = torch.arange(6.0).view(1, 6, 1, 1)
    for pattern in (
        DilatedPattern([large], [1]),
        DilatedPattern([large], [large]),
        DilatedPattern([3], [large]),
    ):
        (problem, *_) = _plan(pattern, 1, 6, 1)
        assert problem.queries.view(x)[0, 0, 0, 0] == 0


def test_offsets_beyond_32_bits():
    """Views of a tensor of more than 2^31 elements start where they should (no memory needed)."""
    x = torch.empty(1, 2**24, 8, 64, device="meta")
    last = _plan(DilatedPattern([2**10], [4]), 1, 2**24, 8)[-1]
    view = last.queries.view(x)
    reach = view.storage_offset() + sum(
        (n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True)
    )
    assert reach > 2**32
    assert reach < x.numel()
