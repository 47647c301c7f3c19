"""The blocks that a dilated pattern touches."""

from __future__ import annotations

import numpy as np
from dilated_core import DilatedPattern, head_offset, kept_rows
from dilated_core.checks import check_integer
from dilated_core.pattern.branches import check_pattern

from dilated_sparse.pattern.blocks import BlockPattern


def from_dilated(
    pattern: DilatedPattern, seq_len: int, block_size: int, num_heads: int
) -> BlockPattern:
    """The blocks in which some branch of a dilated pattern lets a query see a key.

    Block-sparse attention over them sees every key that the dilated pattern selects, and the other
    keys of these blocks. `is_exact_for` tells when there are none, and both are then equal. The
    diagonal is kept even where no branch selects a position of the block.

    Args:
        pattern: The branches.
        seq_len: S.
        block_size: Positions of a block.
        num_heads: H, of the dilated attention.

    Returns:
        A pattern of ⌈S / block_size⌉ blocks: of one list where all heads keep the same blocks, as
        with rates up to `block_size`, else of H lists.

    Example:
        >>> from_dilated(DilatedPattern([4], [1]), 12, 2, num_heads=1).row(2)
        tensor([2, 3])
    """
    check_pattern(pattern)
    S = check_integer("seq_len", seq_len, at_least=1)
    size = check_integer("block_size", block_size, at_least=1)
    H = check_integer("num_heads", num_heads, at_least=1)
    num_blocks = -(-S // size)
    heads = [_rows_of_head(pattern, S, size, num_blocks, head, H) for head in range(H)]
    built = [BlockPattern.from_rows(rows) for rows in heads]
    return built[0] if all(x == built[0] for x in built) else BlockPattern.per_head(built)


def is_exact_for(pattern: DilatedPattern, seq_len: int, block_size: int) -> bool:
    """Whether block-sparse attention over `from_dilated` equals attention over the pattern itself.

    It does for a single branch without dilation whose segments end where blocks end. Two branches
    both select the near keys, which then count twice in dilated attention and once here.
    """
    check_pattern(pattern)
    S = check_integer("seq_len", seq_len, at_least=1)
    size = check_integer("block_size", block_size, at_least=1)
    if len(pattern.branches) != 1 or pattern.padding != "masked":
        return False
    length, rate = pattern.branches[0]
    return rate == 1 and (length >= S or length % size == 0)


def _rows_of_head(
    pattern: DilatedPattern, S: int, size: int, num_blocks: int, head: int, num_heads: int
) -> list[np.ndarray]:
    kept: list[list[np.ndarray]] = [[np.array([i])] for i in range(num_blocks)]
    for length, rate in pattern.branches:
        length = min(length, S)
        offset = head_offset(head, rate, num_heads, pattern.head_offsets)
        for start in range(0, S, length):
            count = kept_rows(min(length, S - start), rate, offset)
            if count == 0:
                continue
            blocks = np.unique((start + offset + rate * np.arange(count)) // size)
            for i in blocks.tolist():
                kept[i].append(blocks)
    return [np.unique(np.concatenate(row)) for row in kept]
