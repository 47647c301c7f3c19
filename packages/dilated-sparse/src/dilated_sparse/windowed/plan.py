"""Which strided views cover a sliding window and the branches beside it: `plan_windowed`.

Backends of core compute squares and rectangles, full or causal, so a window is cut into blocks of
W positions, its own length. A query at place t of its block sees, of its own block, a causal
square, and of the block before it the places after t: a triangle above the diagonal. In the
reversed sequence that triangle lies below the diagonal, a causal square like the other. So two
plans make a window, one for the tensors and one for `reverse` of them, and every query-key pair of
the window is computed once, and no other pair.

What a branch adds beyond the window is a square too: among rows that are r positions apart, a
distance of W positions is ⌈W/r⌉ rows, so query row a sees key rows b ≤ a − ⌈W/r⌉.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from dilated_core import DilatedPattern, Problem, Rows, Span, plan_problems

Overlap = Literal["once", "added"]
"""How often a pair of the window counts that branches select too."""

WINDOW_BRANCH = -1
"""The number by which the window drops: no branch of a pattern has it."""


class Plan(NamedTuple):
    """Problems of the tensors, and problems of the tensors that `reverse` returns."""

    forward: tuple[Problem, ...]
    turned: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a plan depends on, beside the pattern.

    Attributes:
        window: W, at least 1.
        overlap: Whether pairs of the window count again in the branches.
        is_causal: Whether query i sees only the keys j ≤ i.
        seq_len: S.
        batch_size: B.
        num_heads: H.
        num_kv_heads: H_kv.
        head_range: (first, total) as for `dilated_core.plan_problems`.
        is_batch_dense: As for `dilated_core.plan_problems`.
    """

    window: int
    overlap: Overlap
    is_causal: bool
    seq_len: int
    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_range: tuple[int, int] | None
    is_batch_dense: bool


def reverse(x: torch.Tensor) -> torch.Tensor:
    """`(B, S, H, …)` with positions and heads in the opposite order: a copy.

    The heads too, since strips of a branch begin one position *later* with each head: in the
    reversed order they do so again, and groups of heads that share a key head stay together.
    """
    return x.flip(1, 2)


@lru_cache(maxsize=256)
def plan_windowed(pattern: DilatedPattern | None, geometry: Geometry) -> Plan:
    """The problems of a call; each counted (query, key) pair is in exactly one of them.

    Args:
        pattern: The branches; None: the window alone.
        geometry: Everything else.
    """
    window = min(geometry.window, geometry.seq_len)
    forward = list(_own_block(window, geometry))
    turned: list[Problem] = []
    n, m = divmod(geometry.seq_len, window)
    before, turned_before = _block_before(window, n, m)
    forward += _problems(before, geometry)
    turned += _problems(turned_before, geometry)
    if not geometry.is_causal:
        forward += _problems(_block_after(window, n, m), geometry)
    for problem in () if pattern is None else _branches(pattern, geometry):
        if geometry.overlap == "added":
            forward.append(replace(problem, is_first=False))
            continue
        forward += _older_than(geometry.window, problem)
        if not geometry.is_causal:
            turned += _younger_than(geometry.window, problem, geometry)
    return Plan(tuple(forward), tuple(turned))


def _branches(pattern: DilatedPattern, geometry: Geometry) -> tuple[Problem, ...]:
    everything = Span(0, geometry.seq_len)
    return plan_problems(
        pattern,
        queries=everything,
        keys=everything,
        seq_len=geometry.seq_len,
        num_heads=geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_range=geometry.head_range,
        batch_size=geometry.batch_size,
        is_causal=geometry.is_causal,
        is_batch_dense=geometry.is_batch_dense,
    )


def _older_than(window: int, problem: Problem) -> Iterator[Problem]:
    """The keys of a branch that lie W positions or more before each query, and its zero keys."""
    if problem.zero_keys:
        no_keys = replace(problem.keys, num_rows=0)
        yield replace(problem, keys=no_keys, is_causal=False, is_first=False)
    queries, keys = problem.queries, problem.keys
    lag = -(-window // keys.rate)
    if keys.num_rows > lag:
        yield Problem(
            _shortened(queries, first=lag, count=queries.num_rows - lag),
            _shortened(keys, first=0, count=keys.num_rows - lag),
            is_causal=True,
            zero_keys=0,
            is_first=False,
            branch=problem.branch,
        )


def _younger_than(window: int, problem: Problem, geometry: Geometry) -> Iterator[Problem]:
    """The keys of a branch W positions or more after each query, as a problem of `reverse`."""
    turned = Problem(
        _reversed_rows(problem.queries, geometry.seq_len, geometry.num_heads),
        _reversed_rows(problem.keys, geometry.seq_len, geometry.num_kv_heads),
        is_causal=False,
        zero_keys=0,
        is_first=False,
        branch=problem.branch,
    )
    return _older_than(window, turned)


def _shortened(rows: Rows, *, first: int, count: int) -> Rows:
    start = rows.start + first * rows.rate
    return replace(rows, start=start, num_rows=count, is_everything=False)


def _reversed_rows(rows: Rows, seq_len: int, num_heads: int) -> Rows:
    """The same rows in the tensor that `reverse` returns, segments, rows and heads turned round."""
    last = (
        rows.start
        + (rows.num_segments - 1) * rows.segment_length
        + (rows.num_rows - 1) * rows.rate
        + (rows.num_heads - 1) * rows.offset_step
    )
    last_head = rows.first_head + (rows.num_heads - 1) * rows.head_step
    start, first_head = seq_len - 1 - last, num_heads - 1 - last_head
    return replace(rows, start=start, first_head=first_head)


def _own_block(window: int, geometry: Geometry) -> Iterator[Problem]:
    """Each block with itself, the short one at the end too."""
    n, m = divmod(geometry.seq_len, window)
    causal = geometry.is_causal
    cuts = [_Cut(0, 0, n, window, window, window, causal, is_first=True)]
    cuts.append(_Cut(n * window, n * window, 1, window, m, m, causal, is_first=True))
    return _problems(cuts, geometry)


def _block_before(window: int, n: int, m: int) -> tuple[list[_Cut], list[_Cut]]:
    """Each block with the one before it: cuts of the tensors, and of the reversed ones.

    There are n blocks of W positions, and m positions in a short one, with which the reversed
    sequence begins.
    """
    turned = [_Cut(m + 1, m + window, n - 1, window, window - 1, window - 1, True)]
    if n == 0:
        return [], []
    # All of the short block sees the places from m on of the block before it.
    forward = [_Cut(n * window, (n - 1) * window + m, 1, window, m, window - m, False)]
    turned.append(_Cut(1, window, 1, window, m - 1, m - 1, True))
    return forward, turned


def _block_after(window: int, n: int, m: int) -> list[_Cut]:
    """Each block with the one after it: place t sees the places before t."""
    if n == 0:
        return []
    last, behind = (n - 1) * window, n * window
    return [
        _Cut(1, window, n - 1, window, window - 1, window - 1, True),
        _Cut(last + 1, behind, 1, window, m, m, True),
        _Cut(last + m + 1, behind, 1, window, window - 1 - m, m, False),
    ]


@dataclass(frozen=True, slots=True)
class _Cut:
    """Blocks of queries, and as many blocks of keys.

    Attributes:
        query_start, key_start: Position of the first row of the first block.
        count: How many blocks, `step` positions apart.
        step: W.
        num_queries, num_keys: Rows of each block.
        is_causal: Row i of a block of queries sees rows j ≤ i; otherwise all.
        is_first: See `Problem`.
    """

    query_start: int
    key_start: int
    count: int
    step: int
    num_queries: int
    num_keys: int
    is_causal: bool
    is_first: bool = False


def _problems(cuts: Iterable[_Cut], geometry: Geometry) -> Iterator[Problem]:
    B, S = geometry.batch_size, geometry.seq_len
    for cut in cuts:
        if min(cut.count, cut.num_queries, cut.num_keys) < 1:
            continue
        is_one_run = B == 1 or cut.count == 1
        # One stride leads through batch rows and blocks only where blocks fill each batch row.
        is_one_run = is_one_run or (geometry.is_batch_dense and cut.count * cut.step == S)
        for batch in [range(B)] if is_one_run else [range(b, b + 1) for b in range(B)]:
            queries, keys = (
                Rows(
                    first_batch=batch.start,
                    num_batches=len(batch),
                    start=start,
                    num_segments=cut.count,
                    segment_length=cut.step,
                    num_rows=num_rows,
                    rate=1,
                    first_head=0,
                    num_heads=num_heads,
                    head_step=1,
                    offset_step=0,
                    is_everything=len(batch) == B and cut.count == 1 and num_rows == S,
                )
                for start, num_rows, num_heads in (
                    (cut.query_start, cut.num_queries, geometry.num_heads),
                    (cut.key_start, cut.num_keys, geometry.num_kv_heads),
                )
            )
            yield Problem(queries, keys, cut.is_causal, 0, cut.is_first, branch=WINDOW_BRANCH)
