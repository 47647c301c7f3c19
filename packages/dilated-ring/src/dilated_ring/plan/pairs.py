"""How many (query, key) pairs each rank attends to: its share of the FLOPs."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

from dilated_core import DilatedPattern, Span, head_offset, kept_rows

from dilated_ring.plan.parcels import Heads
from dilated_ring.plan.sequences import Spans


def pairs_of_ranks(
    pattern: DilatedPattern,
    heads: Heads,
    ranks: Spans,
    seq_len: int,
    bounds: Sequence[int] | None,
    *,
    is_causal: bool,
) -> tuple[int, ...]:
    """Pairs of each rank's queries with the keys of all ranks, over all heads.

    Pairs count once for each branch that has them; zero keys do not count, as in
    `DilatedPattern.flops`.

    Args:
        pattern, heads, ranks: Of the call.
        seq_len: S.
        bounds: Of the documents, from 0 to S; None: one sequence.
        is_causal: Whether queries see only the past.
    """
    if bounds is None:
        bounds = (0, seq_len)
    return tuple(
        sum(
            count * _pairs(pattern, heads, length, span, is_causal)
            for (length, span), count in Counter(_documents_of(spans, bounds)).items()
        )
        for spans in ranks
    )


def _documents_of(spans: tuple[Span, ...], bounds: Sequence[int]) -> Iterator[tuple[int, Span]]:
    """The length of each document that a rank holds positions of, and these positions in it."""
    for span in spans:
        i = bisect_right(bounds, span.start) - 1
        while i < len(bounds) - 1 and bounds[i] < span.stop:
            start, stop = bounds[i], bounds[i + 1]
            if start < stop:
                mine = Span(max(span.start, start) - start, min(span.stop, stop) - start)
                yield stop - start, mine
            i += 1


@lru_cache(maxsize=4096)
def _pairs(
    pattern: DilatedPattern, heads: Heads, seq_len: int, queries: Span, is_causal: bool
) -> int:
    """Pairs of some queries with all keys of their sequence."""
    total = 0
    first, all_heads = heads.head_range
    for w, rate in pattern.branches:
        w = min(w, seq_len)
        offsets = Counter(
            head_offset(first + h, rate, all_heads, pattern.head_offsets)
            for h in range(heads.num_heads)
        )
        for part, count in _parts(queries, w):
            begin = part.start // w * w
            length = min(w, seq_len - begin)
            for offset, num_heads in offsets.items():
                i = kept_rows(part.start - begin, rate, offset)
                j = kept_rows(part.stop - begin, rate, offset)
                # Query number n of a segment sees the keys 0 to n.
                seen = (i + j + 1) * (j - i) // 2
                pairs = seen if is_causal else (j - i) * kept_rows(length, rate, offset)
                total += num_heads * count * pairs
    return total


def _parts(queries: Span, w: int) -> Iterator[tuple[Span, int]]:
    """The parts of a span in segments of length w, alike complete ones once with their number."""
    start, stop = queries
    first, last = -(-start // w) * w, stop // w * w
    if first > last:
        yield queries, 1
        return
    if start < first:
        yield Span(start, first), 1
    if first < last:
        yield Span(first, first + w), (last - first) // w
    if last < stop:
        yield Span(last, stop), 1
