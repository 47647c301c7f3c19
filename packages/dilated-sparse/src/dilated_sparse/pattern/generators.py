"""Patterns in closed form: windows, strided diagonals, sinks, hierarchies, random blocks.

Each keeps the diagonal, is the same at every call, and takes memory for the kept blocks only. With
`is_causal=True` a pattern has blocks at or below the diagonal only, and fractions count those.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from dilated_core.checks import check_choice, check_integer

from dilated_sparse.pattern.blocks import BlockPattern, packed
from dilated_sparse.pattern.lists import Ints
from dilated_sparse.pattern.ratio import (
    budgeted_pattern,
    check_ratio,
    check_shape,
    coarse_to_fine,
    nearest,
    sinks_and_nearest,
    strided,
)

PatternType = Literal["local_window", "dilated_sparse", "global_local", "hierarchical"]
PATTERN_TYPES: tuple[str, ...] = get_args(PatternType)


def local_window(num_blocks: int, *, window: int, is_causal: bool = False) -> BlockPattern:
    """Each row keeps `window` blocks on each side of its own.

    Args:
        num_blocks: N.
        window: Blocks on each side; 0 for the diagonal alone.
        is_causal: Whether to leave out blocks above the diagonal.

    Example:
        >>> local_window(4, window=1).materialize().int()[0]
        tensor([[1, 1, 0, 0],
                [1, 1, 1, 0],
                [0, 1, 1, 1],
                [0, 0, 1, 1]], dtype=torch.int32)
    """
    N = check_shape(num_blocks, is_causal)
    w = check_integer("window", window, at_least=0)
    ends = [i + 1 if is_causal else min(N, i + w + 1) for i in range(N)]
    return packed([np.arange(max(0, i - w), end) for i, end in enumerate(ends)], 1)


def dilated_sparse(
    num_blocks: int, *, sparsity_ratio: float, is_causal: bool = False
) -> BlockPattern:
    """Strided diagonals at rates 1, 2, 4, …, each within a radius that grows with its rate.

    Each row keeps ⌊sparsity_ratio · N⌉ blocks, one at least. Distance d = odd · 2^l has rate 2^l,
    and smaller odd parts are kept first: ±1, ±2, ±4, …, then ±3, ±6, ±12, …. Where diagonals leave
    the matrix, the row keeps the next ones of its other side.

    Args:
        num_blocks: N.
        sparsity_ratio: Fraction of the blocks of each row to keep, in (0, 1].
        is_causal: Whether to leave out blocks above the diagonal; row i has i + 1 blocks then.

    Example:
        >>> dilated_sparse(8, sparsity_ratio=0.5).row(4)
        tensor([2, 3, 4, 5])
        >>> dilated_sparse(64, sparsity_ratio=0.125, is_causal=True).row(63)
        tensor([31, 47, 55, 59, 60, 61, 62, 63])
    """
    N, ratio = check_shape(num_blocks, is_causal), check_ratio(sparsity_ratio)
    return budgeted_pattern(N, ratio, strided(N), is_causal=is_causal)


def global_local(
    num_blocks: int, *, window: int, num_global: int, is_causal: bool = False
) -> BlockPattern:
    """A `local_window`, and the first `num_global` blocks as sinks: full rows and columns.

    In causal attention only the columns remain of the sinks.

    Args:
        num_blocks: N.
        window: Blocks on each side of the diagonal.
        num_global: Blocks, not positions, that see everything and that everything sees.
        is_causal: Whether to leave out blocks above the diagonal.

    Example:
        >>> global_local(4, window=0, num_global=1).materialize().int()[0]
        tensor([[1, 1, 1, 1],
                [1, 1, 0, 0],
                [1, 0, 1, 0],
                [1, 0, 0, 1]], dtype=torch.int32)
    """
    N = check_shape(num_blocks, is_causal)
    w = check_integer("window", window, at_least=0)
    g = check_integer("num_global", num_global, at_least=0, at_most=N)
    rows: list[np.ndarray] = []
    for i in range(N):
        end = i + 1 if is_causal else min(N, i + w + 1)
        if i < g:
            rows.append(np.arange(i + 1 if is_causal else N))
        else:
            start = max(g, i - w)
            rows.append(np.concatenate([np.arange(g), np.arange(start, end)]))
    return packed(rows, 1)


def hierarchical(
    num_blocks: int, *, levels: int | None = None, is_causal: bool = False
) -> BlockPattern:
    """Coarse to fine: near blocks all, far ones by one block for each cell of a level.

    Level l cuts the sequence into cells of 2^l blocks, and the first block of a cell stands for it.
    A row keeps, at each level, those of its own cell and of the two neighbouring cells: at most
    3 · levels blocks.

    Args:
        num_blocks: N.
        levels: Levels, the first of single blocks; None for as many as there are cells.
        is_causal: Whether to leave out blocks above the diagonal.

    Example:
        >>> hierarchical(16, levels=3).row(9)
        tensor([ 4,  6,  8,  9, 10, 12])
    """
    N = check_shape(num_blocks, is_causal)
    L = _levels(N) if levels is None else check_integer("levels", levels, at_least=1, at_most=62)
    steps = np.arange(L)
    rows: list[np.ndarray] = []
    for i in range(N):
        cells = (i >> steps)[:, None] + np.array([-1, 0, 1])
        kept = np.append((cells << steps[:, None]).ravel(), i)
        rows.append(kept[(kept >= 0) & (kept <= (i if is_causal else N - 1))])
    return BlockPattern.from_rows(rows)


def random_blocks(
    num_blocks: int,
    *,
    num_random: int,
    seed: int = 0,
    num_heads: int = 1,
    is_causal: bool = False,
) -> BlockPattern:
    """Each row keeps its own block and `num_random` others, drawn by the seed.

    United with windows and sinks these are BigBird's patterns (arXiv 2007.14062):
    `global_local(64, window=1, num_global=2) | random_blocks(64, num_random=3)`. PyTorch's and
    numpy's own random states are neither read nor changed.

    Args:
        num_blocks: N.
        num_random: Blocks per row, beside its own; a row without so many keeps all.
        seed: Which ones; at least 0.
        num_heads: P, heads that each draw their own.
        is_causal: Whether to draw blocks below the diagonal only.
    """
    N = check_shape(num_blocks, is_causal)
    count = check_integer("num_random", num_random, at_least=0)
    seed = check_integer("seed", seed, at_least=0)
    P = check_integer("num_heads", num_heads, at_least=1)
    heads: list[list[np.ndarray]] = []
    for head in range(P):
        generator = np.random.default_rng([seed, head])
        rows: list[np.ndarray] = []
        for i in range(N):
            others = i if is_causal else N - 1
            drawn = generator.choice(others, min(count, others), replace=False)
            rows.append(np.append(drawn + (drawn >= i), i))
        heads.append(rows)
    return BlockPattern.from_rows(*heads)


def pattern_of_type(
    pattern_type: PatternType, num_blocks: int, *, sparsity_ratio: float, is_causal: bool = False
) -> BlockPattern:
    """A pattern of a type and a fraction of blocks kept, met to within one block per row.

    `"local_window"`, `"dilated_sparse"` and `"hierarchical"` keep as many blocks in each row.
    `"global_local"` gives an eighth of a row's blocks to sinks, one at least if there are two
    blocks; the full rows of sinks count too, so it meets the fraction over all rows together. A
    causal row depends on its number only: more blocks behind it do not change it.

    Args:
        pattern_type: `"local_window"`, `"dilated_sparse"`, `"global_local"` or `"hierarchical"`.
        num_blocks: N.
        sparsity_ratio: Fraction of blocks to keep, in (0, 1].
        is_causal: Whether to leave out blocks above the diagonal, and count only the others.

    Raises:
        ValueError: If the type is unknown or a number out of range.
    """
    check_choice("pattern_type", pattern_type, PATTERN_TYPES)
    N, ratio = check_shape(num_blocks, is_causal), check_ratio(sparsity_ratio)
    if pattern_type == "dilated_sparse":
        return dilated_sparse(N, sparsity_ratio=ratio, is_causal=is_causal)
    if pattern_type == "local_window":
        return budgeted_pattern(N, ratio, nearest, is_causal=is_causal)
    if pattern_type == "hierarchical":
        return budgeted_pattern(N, ratio, coarse_to_fine(_levels(N)), is_causal=is_causal)
    return _global_local_of_ratio(N, ratio, is_causal)


def _global_local_of_ratio(N: int, ratio: float, is_causal: bool) -> BlockPattern:
    if is_causal:
        # Each row has sinks for its own budget: a longer sequence must not change earlier rows.
        def kept(row: int, budget: int, last: int) -> Ints:
            return sinks_and_nearest(_sinks_of(ratio * (row + 1)))(row, budget, last)

        return budgeted_pattern(N, ratio, kept, is_causal=True)
    g = _sinks_of(ratio * N)
    # The full rows take g·N of the ratio·N² blocks. They come down to what leaves every other row
    # its own block and the sinks.
    while g and (ratio * N * N - g * N) < (N - g) * (g + 1):
        g -= 1
    if g >= N:
        return local_window(N, window=N)
    share = (ratio * N * N - g * N) / (N - g) / N
    rest = budgeted_pattern(N, share, sinks_and_nearest(g), is_causal=False)
    full = np.arange(N)
    return packed([full if i < g else row for i, row in enumerate(rest.rows()[0])], 1)


def _sinks_of(budget: float) -> int:
    """How many of the blocks of a row are sinks."""
    return 0 if budget < 2 else max(1, round(budget / 8))


def _levels(num_blocks: int) -> int:
    """Levels until one cell holds everything."""
    return (num_blocks - 1).bit_length() + 1
