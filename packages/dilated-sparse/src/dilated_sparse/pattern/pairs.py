"""How many pairs of a query and a key that it sees are in kept blocks: what FLOP counters count."""

from __future__ import annotations

import numpy as np
import torch

from dilated_sparse.pattern.blocks import BlockPattern

_EXACT_ROWS = 2**22  # of blocks, whose budgets are rounded one by one


def pairs_of_blocks(
    rows: torch.Tensor, blocks: torch.Tensor, seq_len: int, block_size: int, *, is_causal: bool
) -> int:
    """Pairs in the blocks (i, j) of a sequence.

    Args:
        rows, blocks: Integers of one shape, i and j.
        seq_len: S; the last block may be short.
        block_size: Positions of a block.
        is_causal: Whether query i sees only keys j ≤ i.

    Example:
        >>> pairs_of_blocks(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 5, 3, is_causal=True)
        15
    """
    queries, keys = ((seq_len - block_size * x).clamp_max(block_size) for x in (rows, blocks))
    pairs = queries * keys
    if is_causal:
        own = queries * (queries + 1) // 2
        pairs = torch.where(rows == blocks, own, pairs.masked_fill(blocks > rows, 0))
    return int(pairs.sum())


def pairs_of_pattern(
    pattern: BlockPattern, seq_len: int, block_size: int, *, is_causal: bool, num_heads: int
) -> int:
    """Pairs of all heads in the blocks that a pattern keeps; the heads share its P lists."""
    offsets, blocks = pattern.row_offsets, pattern.block_indices
    counts = offsets.diff().flatten()
    rows = torch.arange(offsets.shape[1] - 1, device=offsets.device).repeat(offsets.shape[0])
    rows = rows.repeat_interleave(counts)
    pairs = pairs_of_blocks(rows, blocks, seq_len, block_size, is_causal=is_causal)
    return pairs * (num_heads // offsets.shape[0])


def pairs_of_budget(
    seq_len: int,
    block_size: int,
    *,
    ratio: float | None = None,
    count: int | None = None,
    at_least: int = 1,
) -> int:
    """Causal pairs of a head whose rows keep their own block and a number of earlier ones.

    That is every pattern by ratio, and every selection by number or ratio, whichever blocks these
    are. Beyond millions of rows, budgets are not rounded one by one.

    Args:
        seq_len: S.
        block_size: Positions of a block.
        ratio, count: Blocks of a row, its own among them: this fraction of the i + 1 that row i
            has, rounded, or this number. None: all of them.
        at_least: Blocks that every row keeps in any case, or as many as it has.

    Example:
        >>> pairs_of_budget(8, 2, count=2)
        24
    """
    N = -(-seq_len // block_size)
    if N == 0:
        return 0
    tail = seq_len - (N - 1) * block_size
    own = (N - 1) * block_size * (block_size + 1) // 2 + tail * (tail + 1) // 2
    exact = min(N, _EXACT_ROWS)
    there = np.arange(1, exact + 1)
    kept = there
    if ratio is not None:
        kept = np.rint(ratio * there).astype(np.int64)
    elif count is not None:
        kept = np.minimum(there, count)
    kept = np.minimum(there, np.maximum(kept, max(1, at_least)))
    earlier = int((kept - 1).sum())
    if exact < N:
        most = N * (N + 1) // 2 - exact * (exact + 1) // 2
        share = most if ratio is None else int(ratio * most)
        earlier += (N - exact) * (count - 1) if count is not None else share - (N - exact)
        last = (count or round((ratio or 1.0) * N)) - 1
    else:
        last = int(kept[-1]) - 1
    # The last row of blocks may be short; the blocks before it are whole.
    return own + (earlier - last) * block_size**2 + last * block_size * tail
