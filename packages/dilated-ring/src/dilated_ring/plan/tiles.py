"""Tiles of queries and keys, and the order in which a rank works through them.

The order changes no value but by rounding: partial results merge in any order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

from dilated_core import DilatedPattern, Span
from dilated_core.pattern.hilbert import hilbert_order

from dilated_ring.plan.sequences import Piece

Row = TypeVar("Row")
Column = TypeVar("Column")


def cut_into_tiles(pieces: Sequence[Piece], tile_size: int | None) -> Sequence[Piece]:
    """The pieces, cut at all multiples of `tile_size`; None: as they are.

    Multiples are counted from the start of the sequence, so a segment whose length is a multiple of
    the tile's consists of whole tiles.
    """
    if tile_size is None:
        return pieces
    return [
        Piece(Span(a, min(b, piece.span.stop)), piece.at + a - piece.span.start)
        for piece in pieces
        for a, b in _cuts(piece.span, tile_size)
    ]


def in_order(
    rows: Sequence[Row], columns: Sequence[Column], tile_size: int | None
) -> Iterator[tuple[Row, Column]]:
    """Every pair of a row and a column: by rows, or along a Hilbert curve if there are tiles.

    On the curve, neighbours in time share their row or their column (apart from jumps where the
    grid ends), and a pair is soon followed by all those around it.
    """
    if tile_size is None:
        return ((row, column) for row in rows for column in columns)
    cells = _hilbert_cells(len(rows), len(columns))
    return ((rows[i], columns[j]) for i, j in cells)


def may_meet(pattern: DilatedPattern, queries: Span, keys: Span, *, is_causal: bool) -> bool:
    """False only if no query sees a key: cheaper than a plan, as most of many tiles are far apart.

    The spans are equal or do not overlap.
    """
    if is_causal and keys.start > queries.start:
        return False
    # Segments of one branch need not lie within those of another, so no single w decides.
    return any(
        keys.start // w <= (queries.stop - 1) // w and queries.start // w <= (keys.stop - 1) // w
        for w in pattern.segment_lengths
    )


def _cuts(span: Span, size: int) -> Iterator[tuple[int, int]]:
    start = span.start
    while start < span.stop:
        stop = (start // size + 1) * size
        yield start, stop
        start = stop


@lru_cache(maxsize=64)
def _hilbert_cells(height: int, width: int) -> tuple[tuple[int, int], ...]:
    numbers: list[int] = hilbert_order(height, width).tolist()  # pyright: ignore
    return tuple(divmod(number, width) for number in numbers)
