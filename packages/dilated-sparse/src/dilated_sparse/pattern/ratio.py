"""Rows of a given number of blocks: each row keeps the blocks that its kind of pattern ranks first.

A kind of pattern is a rank of the blocks of a row. The rank of the row's own block is the lowest,
so the diagonal is always kept, and a row at the border, which has fewer blocks on one side, keeps
more on the other. The fraction kept is therefore met in every row. Of equal ranks the nearest block
comes first, and of two at one distance the one before the row.

No row ranks all its blocks: time and memory are those of the kept blocks, not N².
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from dilated_core.checks import check_bool, check_integer, check_number

from dilated_sparse.pattern.blocks import BlockPattern, packed
from dilated_sparse.pattern.lists import Ints

Kept = Callable[[int, int, int], Ints]
"""From a row, how many blocks it keeps, and the last block it has: these blocks, ascending."""


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


def budgeted_pattern(num_blocks: int, ratio: float, kept: Kept, *, is_causal: bool) -> BlockPattern:
    """Each row keeps its `row_budget` of blocks."""
    rows = [
        kept(i, row_budget(ratio, i, num_blocks, is_causal), i if is_causal else num_blocks - 1)
        for i in range(num_blocks)
    ]
    return packed(rows, 1)


def nearest(row: int, budget: int, last: int, *, first: int = 0) -> Ints:
    """Local windows: the nearest blocks from `first` to `last`, which are a run."""
    start = min(max(first, row - budget // 2), last + 1 - budget)
    return np.arange(start, start + budget)


def strided(num_blocks: int) -> Kept:
    """Strided diagonals: blocks ranked by the odd part of their distance.

    Distance d has rate 2^l, the largest power of 2 that divides it, and odd part d / 2^l. All
    distances with an odd part of at most w are those d with rate 2^l and d ≤ w · 2^l: each rate has
    a radius, which grows with the rate.
    """
    d = np.arange(1, num_blocks, dtype=np.int64)
    ranked = d[np.argsort(d // np.maximum(d & -d, 1), kind="stable")]

    def kept(row: int, budget: int, last: int) -> Ints:
        # A prefix of the ranked distances, longer until enough of them lead to blocks.
        number = 2 * budget
        while True:
            distances = ranked[:number]
            blocks = np.stack([row - distances, row + distances], 1).ravel()
            blocks = blocks[(blocks >= 0) & (blocks <= last)]
            if len(blocks) >= budget - 1:
                return np.sort(np.append(blocks[: budget - 1], row))
            number *= 2

    return kept


def sinks_and_nearest(num_sinks: int) -> Kept:
    """The row's own block, then the first `num_sinks` blocks, then the nearest."""

    def kept(row: int, budget: int, last: int) -> Ints:
        sinks = min(num_sinks, last + 1)
        if row < sinks:
            return nearest(row, budget, max(sinks, budget) - 1)
        near = max(1, budget - sinks)
        far = np.arange(sinks - (budget - near), sinks)
        return np.concatenate([far, nearest(row, near, last, first=sinks)])

    return kept


def coarse_to_fine(levels: int) -> Kept:
    """Cells of 2^l blocks, of which the first block stands for the cell.

    The rank of a block is the smallest distance, in cells, between its cell and the cell of the row
    at any level of which it is a first block; equal ranks of finer levels first.
    """
    level = np.arange(levels)[:, None]

    def kept(row: int, budget: int, last: int) -> Ints:
        # Cells up to some distance at every level, further until they have enough blocks.
        reach = 1 + budget // levels
        while True:
            apart = np.arange(-reach, reach + 1)
            blocks = ((row >> level) + apart) << level
            rank = (np.abs(apart) * levels + level) * (last + 1) + np.abs(blocks - row)
            there = (blocks >= 0) & (blocks <= last)
            found = blocks[there]
            found = found[np.argsort((rank * 2 + (blocks > row))[there])]
            # Each block once, where it ranks lowest.
            numbers, places = np.unique(found, return_index=True)
            if len(numbers) >= budget:
                return np.sort(numbers[np.argsort(places)[:budget]])
            reach *= 2

    return kept
