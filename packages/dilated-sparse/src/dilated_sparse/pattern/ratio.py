"""Rows of a given number of blocks: each row keeps the blocks that its kind of pattern ranks first.

A kind of pattern is a rank of the blocks of a row. The rank of the row's own block is the lowest,
so the diagonal is always kept, and a row at the border, which has fewer blocks on one side, keeps
more on the other. The fraction kept is therefore met in every row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from dilated_core.checks import check_bool, check_integer, check_number

from dilated_sparse.pattern.blocks import BlockPattern, Ints

Rank = Callable[[int, Ints], Ints]
"""From a row i and blocks j, the rank of each block: lower is kept first."""


def check_ratio(ratio: float) -> float:
    """`ratio` itself, if it is a fraction of blocks to keep.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not in (0, 1].
    """
    ratio = check_number("sparsity_ratio", ratio, above=0, fix=", the fraction of blocks to keep")
    if ratio > 1:
        raise ValueError(
            f"sparsity_ratio is {ratio}; it is the fraction of blocks to keep, so at most 1."
        )
    return ratio


def check_shape(num_blocks: int, is_causal: bool) -> int:
    """`num_blocks` itself, if both arguments are what every generator takes."""
    check_bool("is_causal", is_causal)
    return check_integer("num_blocks", num_blocks, at_least=1)


def row_budget(ratio: float, row: int, num_blocks: int, is_causal: bool) -> int:
    """Blocks that a row keeps: `ratio` of those there are, rounded, and one at least."""
    return max(1, round(ratio * (row + 1 if is_causal else num_blocks)))


def ranked_pattern(num_blocks: int, ratio: float, rank: Rank, *, is_causal: bool) -> BlockPattern:
    """Each row keeps its `row_budget` of blocks, by rank; by distance between equal ranks."""
    blocks = np.arange(num_blocks, dtype=np.int64)
    rows: list[npt.NDArray[np.int64]] = []
    for i in range(num_blocks):
        j = blocks[: i + 1] if is_causal else blocks
        budget = row_budget(ratio, i, num_blocks, is_causal)
        distance = np.abs(j - i)
        # One number per block, and no two equal, so that a partition replaces sorting the row.
        # Of two blocks at one distance, the one before the row comes first.
        key = (rank(i, j) * num_blocks + distance) * 2 + (j > i)
        rows.append(np.argpartition(key, budget - 1)[:budget] if budget < len(j) else j)
    return BlockPattern.from_rows(rows)


def distance_rank(i: int, j: Ints) -> Ints:
    """Local windows: nearest blocks first."""
    return np.abs(j - i)


def strided_rank(i: int, j: Ints) -> Ints:
    """Strided diagonals: odd part of the distance, 0 for the block itself.

    Distance d has rate 2^l, the largest power of 2 that divides it, and odd part d / 2^l. All
    distances with an odd part of at most w are those d with rate 2^l and d ≤ w · 2^l: each rate has
    a radius, which grows with the rate.
    """
    d = np.abs(j - i)
    return d // np.maximum(d & -d, 1)


def sink_rank(num_global: int) -> Rank:
    """First the block itself, then the first `num_global` blocks, then the nearest."""

    def rank(i: int, j: Ints) -> Ints:
        d = np.abs(j - i)
        return np.where(j < num_global, np.minimum(d, 1), d + (d > 0))

    return rank


def coarse_rank(num_blocks: int, levels: int) -> Rank:
    """Coarse to fine: cells of 2^l blocks, of which the first block stands for the cell.

    The rank of a block is the smallest distance, in cells, between its cell and the cell of the row
    at any level of which it is a first block; equal ranks of finer levels first.
    """

    def rank(i: int, j: Ints) -> Ints:
        best = np.full(j.shape, num_blocks * levels, dtype=np.int64)
        for level in range(levels):
            cells = np.abs((j >> level) - (i >> level)) * levels + level
            best = np.where(j % (1 << level) == 0, np.minimum(best, cells), best)
        return best

    return rank
