"""Which positions of a sequence each rank holds."""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal, get_args

from dilated_core import Span

Layout = Literal["contiguous", "zigzag"]

LAYOUTS: tuple[str, ...] = get_args(Layout)


@lru_cache(maxsize=256)
def spans_of_ranks(layout: Layout, seq_len: int, size: int) -> tuple[tuple[Span, ...], ...]:
    """The spans of positions of each rank, in the order in which it holds them.

    Args:
        layout: `"contiguous"`: rank i holds the i-th of `size` parts. `"zigzag"`: it holds the i-th
            part from the front and the i-th from the back of 2·`size`, so that under causality all
            ranks have about equally much to do.
        seq_len: S, any number from 0 on. Parts differ by at most one position; the longer ones
            come first. A rank may hold nothing.
        size: How many ranks.

    Returns:
        For each rank, ascending spans that do not touch, none of them empty.

    Example:
        >>> spans_of_ranks("contiguous", 10, 3)
        ((Span(start=0, stop=4),), (Span(start=4, stop=7),), (Span(start=7, stop=10),))
        >>> spans_of_ranks("zigzag", 8, 2)[0]
        (Span(start=0, stop=2), Span(start=6, stop=8))
    """
    if layout == "contiguous":
        return tuple(joined([part]) for part in _parts(seq_len, size))
    parts = _parts(seq_len, 2 * size)
    return tuple(joined([parts[rank], parts[-1 - rank]]) for rank in range(size))


def joined(spans: list[Span]) -> tuple[Span, ...]:
    """The spans in ascending order, without empty ones, those that touch as one."""
    result: list[Span] = []
    for span in sorted(span for span in spans if span.length):
        if result and result[-1].stop == span.start:
            result[-1] = Span(result[-1].start, span.stop)
        else:
            result.append(span)
    return tuple(result)


def num_positions(spans: tuple[Span, ...]) -> int:
    """How many positions the spans hold together."""
    return sum(span.length for span in spans)


def _parts(seq_len: int, count: int) -> list[Span]:
    quotient, remainder = divmod(seq_len, count)
    lengths = [quotient + (i < remainder) for i in range(count)]
    return [Span(a, b) for a, b in pairwise(accumulate(lengths, initial=0))]
