"""Sequences that are cut over ranks: the whole one, or each document that crosses a border."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from dilated_core import Span


class Piece(NamedTuple):
    """Positions of one sequence that a rank holds.

    Attributes:
        span: The positions, counted from the start of the sequence.
        at: Index of the first one in the rank's tensors.
    """

    span: Span
    at: int

    @property
    def rows(self) -> slice:
        """The indices in the rank's tensors."""
        return slice(self.at, self.at + self.span.length)


class CutSequence(NamedTuple):
    """A sequence, or a document, of which several ranks may hold pieces.

    Attributes:
        start: Position of its first token among all positions.
        seq_len: Its length.
        pieces: What each rank holds, in ascending order.
    """

    start: int
    seq_len: int
    pieces: tuple[tuple[Piece, ...], ...]


Spans = tuple[tuple[Span, ...], ...]
"""The spans of positions of each rank, as of `dilated_ring.layout.spans_of_ranks`."""


def cut_sequence(ranks: Spans, start: int, stop: int) -> CutSequence:
    """The positions from `start` to `stop` as one sequence, over the ranks that hold them."""
    pieces: list[tuple[Piece, ...]] = []
    for spans in ranks:
        held: list[Piece] = []
        offsets = accumulate((span.length for span in spans), initial=0)
        for span, offset in zip(spans, offsets, strict=False):
            a, b = max(span.start, start), min(span.stop, stop)
            if a < b:
                held.append(Piece(Span(a - start, b - start), offset + a - span.start))
        pieces.append(tuple(held))
    return CutSequence(start, stop - start, tuple(pieces))


def cut_sequences(
    ranks: Spans, seq_len: int, bounds: Sequence[int] | None, *, is_cut_only: bool = True
) -> tuple[CutSequence, ...]:
    """The whole sequence, or its documents: with `is_cut_only`, those that cross borders."""
    if bounds is None:
        return (cut_sequence(ranks, 0, seq_len),)
    documents = crossing_documents(ranks, bounds)
    if not is_cut_only:
        documents = tuple(document for document in pairwise(bounds) if document[0] < document[1])
    return tuple(cut_sequence(ranks, *document) for document in documents)


class LocalDocuments(NamedTuple):
    """Whole documents, one after another, that a rank holds.

    Attributes:
        at: Index of the first position in the rank's tensors.
        bounds: Numbers of the entries of `cu_seqlens`, from the first document's begin to the last
            one's end.
    """

    at: int
    bounds: range


def crossing_documents(ranks: Spans, bounds: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of each document that lies in more than one span, ascending."""
    found: dict[int, int] = {}
    for spans in ranks:
        for span in spans:
            i = bisect_right(bounds, span.start)
            if i < len(bounds) and bounds[i - 1] < span.start:
                found[bounds[i - 1]] = bounds[i]
    return tuple(sorted(found.items()))


def local_documents(spans: tuple[Span, ...], bounds: Sequence[int]) -> list[LocalDocuments]:
    """The documents that lie in one of a rank's spans as a whole, by span."""
    runs: list[LocalDocuments] = []
    at = 0
    for span in spans:
        # Empty documents at a border belong to nobody: they have no position.
        first = bisect_right(bounds, span.start) - 1
        if bounds[first] < span.start:
            first += 1
        last = bisect_right(bounds, span.stop) - 1
        if first < last and bounds[first] < bounds[last]:
            runs.append(LocalDocuments(at + bounds[first] - span.start, range(first, last + 1)))
        at += span.length
    return runs
