"""Tiles cover the pieces once; their order visits every pair, neighbours one after another."""

from itertools import pairwise

import pytest
from dilated_core import DilatedPattern, Span
from dilated_ring.layout import spans_of_ranks
from dilated_ring.plan.sequences import cut_sequence
from dilated_ring.plan.tiles import cut_into_tiles, in_order, may_meet


@pytest.mark.parametrize("tile_size", [1, 5, 8, 100])
def test_tiles_cover_the_pieces(tile_size: int) -> None:
    sequence = cut_sequence(spans_of_ranks("zigzag", 75, 3), 4, 71)
    for pieces in sequence.pieces:
        tiles = cut_into_tiles(pieces, tile_size)
        positions = [(i, t.at + i - t.span.start) for t in tiles for i in range(*t.span)]
        assert positions == [(i, p.at + i - p.span.start) for p in pieces for i in range(*p.span)]
        for tile in tiles:
            assert tile.span.start // tile_size == (tile.span.stop - 1) // tile_size
    assert cut_into_tiles(sequence.pieces[0], None) is sequence.pieces[0]


def test_the_order_is_a_hilbert_curve() -> None:
    pairs = list(in_order(range(8), range(8), 1))
    assert sorted(pairs) == [(i, j) for i in range(8) for j in range(8)]
    for (i, j), (m, n) in pairwise(pairs):
        assert abs(i - m) + abs(j - n) == 1
    odd = list(in_order("abc", range(5), 1))
    assert sorted(odd) == [(i, j) for i in "abc" for j in range(5)]
    assert odd != sorted(odd)
    assert list(in_order("ab", "xy", None)) == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert list(in_order("", "xy", 1)) == []


def test_tiles_far_apart_are_skipped() -> None:
    pattern = DilatedPattern([4, 10], [1, 2])

    def meet(queries: tuple[int, int], keys: tuple[int, int], is_causal: bool = False) -> bool:
        return may_meet(pattern, Span(*queries), Span(*keys), is_causal=is_causal)

    assert meet((0, 5), (5, 10))
    assert not meet((0, 5), (5, 10), True)
    assert meet((5, 10), (0, 5), True)
    assert meet((5, 10), (5, 10), True)
    # No segment of 10 reaches across position 10, and the one of 4 from 8 on does.
    assert meet((5, 10), (10, 15))
    assert meet((10, 15), (5, 10), True)
    assert not meet((5, 8), (20, 25))
    assert not meet((20, 25), (5, 8), True)
    assert meet((8, 12), (12, 16))
