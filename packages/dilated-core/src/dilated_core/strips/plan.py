"""Which strided views cover a pattern: `plan_problems`, for whole sequences and parts of them.

One function serves every use. Attention over a whole sequence has queries and keys in the span
(0, S). A hop of a ring has the queries of one shard and the keys of another; a step of streaming
has the rows that a chunk completes. Positions in spans are those of the whole sequence, and a
tensor holds the positions of its span.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeVar

from dilated_core.pattern.branches import DilatedPattern, head_offset, kept_rows
from dilated_core.strips.view import Rows

_T = TypeVar("_T")


class Span(NamedTuple):
    """Positions of the whole sequence: from `start` to before `stop`."""

    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many positions."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Problem:
    """Ordinary attention of some rows over some rows: one call of a backend. Also called a strip.

    Attributes:
        queries: Rows of tensors with the heads of q.
        keys: Rows of tensors with the heads of k and v, for the same segments and heads; without
            any row where there are only zero keys.
        is_causal: Query row i sees key rows j ≤ i, of equally many; otherwise all.
        zero_keys: Zero keys that `padding="attended"` adds to each query.
        is_first: No problem earlier in the plan has these queries.
        branch: Number of the branch in the pattern.
    """

    queries: Rows
    keys: Rows
    is_causal: bool
    zero_keys: int
    is_first: bool
    branch: int = 0

    def split(self, step: int) -> list[Problem]:
        """Cut it into problems of at most `step` segments and batch rows together."""
        total = self.queries.num_problems
        if total <= step:
            return [self]
        return [
            replace(
                self,
                queries=self.queries.part(first, min(step, total - first)),
                keys=self.keys.part(first, min(step, total - first)),
            )
            for first in range(0, total, step)
        ]


@lru_cache(maxsize=1024)
def plan_problems(
    pattern: DilatedPattern,
    *,
    queries: Span,
    keys: Span,
    seq_len: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_range: tuple[int, int] | None = None,
    batch_size: int = 1,
    is_causal: bool = False,
    is_batch_dense: bool = False,
) -> tuple[Problem, ...]:
    """The problems by which queries of one span attend to keys of another.

    Over spans of keys that cover the sequence once, the problems of all plans together are the
    whole attention of the queries.

    Args:
        pattern: The branches.
        queries: Positions that the tensors with the heads of q hold.
        keys: Positions that the tensors with the heads of k and v hold.
        seq_len: S, of the whole sequence.
        num_heads: H, heads in the tensors.
        num_kv_heads: H_kv, which divides H; H if None.
        head_range: (first, total): the tensors hold the heads from `first` on of `total`; (0, H)
            if None.
        batch_size: B.
        is_causal: Query i sees only the keys j ≤ i.
        is_batch_dense: Whether, in every tensor to be viewed, each batch row starts where the last
            one ends (`dilated_core.strips.view.is_batch_dense`).

    Returns:
        Problems in the order to run them, undilated branches first; none if no query sees a key.
        Every (branch, batch, head, query, key) that the pattern allows is in exactly one of them.

    Example:
        >>> pattern = DilatedPattern([4, 8], [1, 2])
        >>> left, right = Span(0, 6), Span(6, 12)
        >>> hop = plan_problems(pattern, queries=right, keys=left, seq_len=12, num_heads=1)
        >>> [(p.queries.num_rows, p.keys.num_rows) for p in hop]  # segments (4, 8) and (0, 8)
        [(2, 2), (1, 3)]
    """
    if queries.length == 0 or keys.length == 0:
        return ()
    first, total = head_range or (0, num_heads)
    group = num_heads // (num_kv_heads or num_heads)
    problems: list[Problem] = []
    by_rate = sorted(enumerate(pattern.branches), key=lambda item: item[1].dilation_rate)
    for i, (branch, (w, r)) in enumerate(by_rate):
        w = min(w, seq_len)
        offsets = [head_offset(first + h, r, total, pattern.head_offsets) for h in range(num_heads)]
        head_step = 1 if pattern.head_offsets == "interleaved" else -(-total // r)
        for cut in _cut_segments(w, queries, keys, seq_len):
            # Zero keys belong to the span of keys in which their segment begins.
            padded = pattern.padding == "attended" and not is_causal and cut.start in range(*keys)
            rows = [_kept_by(cut, offset, r, -(-w // r) if padded else 0) for offset in offsets]
            batching = _batching(
                batch_size,
                cut.count,
                is_batch_dense and queries.length == keys.length == cut.count * w,
            )
            for run in _head_runs(offsets, rows, head_step, group):
                offset = offsets[run.heads[0]]
                for part in _decompose(rows[run.heads[0]], is_causal):
                    problems.extend(
                        Problem(
                            queries=_rows(
                                part.queries, queries, batch_size, num_heads, cut, w, r, offset,
                                run.heads, run.offset_step, batches, segments,
                            ),
                            keys=_rows(
                                part.keys, keys, batch_size, num_heads // group, cut, w, r, offset,
                                run.kv_heads, run.offset_step, batches, segments,
                            ),
                            is_causal=part.is_causal,
                            zero_keys=part.zero_keys,
                            is_first=i == 0 and part.is_first,
                            branch=branch,
                        )
                        for batches, segments in batching
                    )  # fmt: skip
    return tuple(problems)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Segments of one branch that both spans cut in the same way.

    Attributes:
        start: Position of the first segment.
        count: How many segments, w apart.
        length: Of each; below w only for the last segment of the sequence.
        queries, keys: The part of each segment that is in the span, as (from, to) in the segment.
    """

    start: int
    count: int
    length: int
    queries: tuple[int, int]
    keys: tuple[int, int]


def _cut_segments(w: int, queries: Span, keys: Span, seq_len: int) -> Iterator[_Cut]:
    """The segments in both spans: one that begins before them, complete ones, one that ends after.

    Complete ones have the length w and lie in both spans as a whole.
    """
    n = max(queries.start // w, keys.start // w)
    end = min(-(-queries.stop // w), -(-keys.stop // w))
    complete = max(n, -(-max(queries.start, keys.start) // w))
    complete_end = min(queries.stop, keys.stop) // w
    while n < end:
        if complete <= n < complete_end:
            yield _Cut(n * w, complete_end - n, w, (0, w), (0, w))
            n = complete_end
            continue
        start, stop = n * w, min((n + 1) * w, seq_len)
        part = [
            (max(span.start, start) - start, min(span.stop, stop) - start)
            for span in (queries, keys)
        ]
        yield _Cut(start, 1, stop - start, part[0], part[1])
        n += 1


class _Kept(NamedTuple):
    """What a head keeps of each segment of a cut.

    Attributes:
        queries, keys: Numbers of the rows that are in the span of queries and of keys.
        zero_keys: Zero keys that fill the segment.
    """

    queries: range
    keys: range
    zero_keys: int


def _kept_by(cut: _Cut, offset: int, rate: int, padded_rows: int) -> _Kept:
    queries, keys = (
        range(kept_rows(start, rate, offset), kept_rows(stop, rate, offset))
        for start, stop in (cut.queries, cut.keys)
    )
    return _Kept(queries, keys, max(0, padded_rows - kept_rows(cut.length, rate, offset)))


class _Part(NamedTuple):
    queries: range
    keys: range
    is_causal: bool
    zero_keys: int
    is_first: bool


def _decompose(kept: _Kept, is_causal: bool) -> list[_Part]:
    """Cut a causal rectangle into what is seen as a whole and one causal square."""
    queries, keys, zero_keys = kept
    if not queries or not (keys or zero_keys):
        return []
    if not is_causal:
        return [_Part(queries, keys, False, zero_keys, True)]
    i, i_stop, j, j_stop = queries.start, queries.stop, keys.start, keys.stop
    first = max(i, j)
    before = range(j, min(j_stop, i))
    square = range(first, min(i_stop, j_stop))
    later, seen = range(max(j_stop, i), i_stop), range(first, j_stop)
    is_first = not before
    parts: list[_Part] = []
    if before:
        parts.append(_Part(queries, before, False, 0, True))
    if square:
        parts.append(_Part(square, square, True, 0, is_first))
    if later and seen:
        parts.append(_Part(later, seen, False, 0, is_first))
    return parts


def _rows(
    numbers: range,
    span: Span,
    batch_size: int,
    num_heads: int,
    cut: _Cut,
    segment_length: int,
    rate: int,
    offset: int,
    heads: Sequence[int],
    offset_step: int,
    batches: range,
    segments: range,
) -> Rows:
    """The rows of the given numbers, in a tensor that holds the positions of a span."""
    count = len(numbers)
    start = cut.start + segments.start * segment_length + offset + numbers.start * rate
    return Rows(
        first_batch=batches.start,
        num_batches=len(batches),
        start=start - span.start,
        num_segments=len(segments),
        segment_length=segment_length,
        num_rows=count,
        # The stride of a single row is never used, and a rate may be too large for one.
        rate=rate if count > 1 else 1,
        first_head=heads[0],
        num_heads=len(heads),
        head_step=heads[1] - heads[0] if len(heads) > 1 else 1,
        offset_step=offset_step,
        is_everything=(len(batches), len(segments), count) == (batch_size, 1, span.length)
        and len(heads) == num_heads,
    )


def _batching(batch_size: int, num_segments: int, is_mergeable: bool) -> list[tuple[range, range]]:
    """Cut B × segments into ranges of both, such that one stride leads through each pair."""
    batches, segments = range(batch_size), range(num_segments)
    if batch_size == 1 or num_segments == 1 or is_mergeable:
        return [(batches, segments)]
    if batch_size <= num_segments:
        return [(range(b, b + 1), segments) for b in batches]
    return [(batches, range(n, n + 1)) for n in segments]


class _Run(NamedTuple):
    """Heads that one view covers: equal steps, equal rows.

    Attributes:
        heads: Heads of q, at one step.
        kv_heads: Heads of k and v, at one step; each for `len(heads) / len(kv_heads)` of `heads`.
        offset_step: Positions by which each next head starts later: 0 or 1.
    """

    heads: Sequence[int]
    kv_heads: Sequence[int]
    offset_step: int


def _head_runs(
    offsets: Sequence[int], rows: Sequence[_Kept], head_step: int, group: int
) -> list[_Run]:
    """Cut the heads, given with their offsets and rows, into the fewest runs.

    Heads of one offset make runs, and so do heads `head_step` apart whose offsets rise by one; the
    latter break where the rows differ, as in a segment whose length r does not divide.
    """
    same_offset: dict[int, list[int]] = {}
    rising_offset: dict[int, list[int]] = {}
    for head, offset in enumerate(offsets):
        same_offset.setdefault(offset, []).append(head)
        before = head - head_step
        run = rising_offset.get(before)
        if run is not None and offsets[before] == offset - 1 and rows[before] == rows[head]:
            run.append(head)
            rising_offset[head] = run
        else:
            rising_offset[head] = [head]
    rising = {run[0]: run for run in rising_offset.values()}
    return min(
        [run for heads in same_offset.values() for run in _sharing_runs(heads, group)],
        [run for heads in rising.values() for run in _rising_runs(heads, group)],
        key=len,
    )


def _rising_runs(heads: Sequence[int], group: int) -> Iterable[_Run]:
    """Cut heads that each start one position later: every one needs a kv head of its own view."""
    for part in _cut_at_constant_step([(head // group, head) for head in heads]):
        yield _Run([head for _, head in part], [kv_head for kv_head, _ in part], 1)


def _sharing_runs(heads: Sequence[int], group: int) -> Iterable[_Run]:
    """Cut heads of one offset where neighbours may attend to one kv head, equally many to each."""
    shares = [(kv, list(hs)) for kv, hs in groupby(heads, key=lambda head: head // group)]
    for _, equal in groupby(shares, key=lambda share: len(share[1])):
        for part in _cut_at_constant_step(list(equal)):
            yield _Run([h for _, hs in part for h in hs], [kv for kv, _ in part], 0)


def _cut_at_constant_step(items: Sequence[tuple[int, _T]]) -> list[list[tuple[int, _T]]]:
    """Cut a sequence of (number, …) so that the numbers of each part have one step."""
    parts: list[list[tuple[int, _T]]] = []
    for item in items:
        last = parts[-1] if parts else []
        if last and (len(last) == 1 or item[0] - last[-1][0] == last[1][0] - last[0][0]):
            last.append(item)
        else:
            parts.append([item])
    return parts
