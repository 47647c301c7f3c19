"""Spans of ranks: each position at exactly one rank, for any length and any number of ranks."""

from itertools import pairwise

import pytest
from dilated_core import Span
from dilated_ring.layout import Layout, num_positions, spans_of_ranks


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("seq_len", [0, 1, 2, 3, 7, 8, 9, 16, 100, 101])
def test_each_position_is_held_once(layout: Layout, size: int, seq_len: int) -> None:
    ranks = spans_of_ranks(layout, seq_len, size)
    assert len(ranks) == size
    held = [i for spans in ranks for span in spans for i in range(*span)]
    assert sorted(held) == list(range(seq_len))
    lengths = [num_positions(spans) for spans in ranks]
    assert max(lengths) - min(lengths) <= (1 if layout == "contiguous" else 2)
    for spans in ranks:
        assert all(span.length for span in spans)
        assert all(a.stop < b.start for a, b in pairwise(spans))


def test_zigzag_pairs_the_front_with_the_back() -> None:
    assert spans_of_ranks("zigzag", 8, 2) == ((Span(0, 2), Span(6, 8)), (Span(2, 6),))
