"""`BlockSelection`: the kept blocks of each batch row and head of k, chosen from the data.

B batch, K heads of k and v, N blocks, M the most blocks a row may keep.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dilated_sparse.pattern.blocks import BlockPattern


class BlockSelection(NamedTuple):
    """Kept blocks as left-packed lists, on the device of the data.

    A `BlockPattern` is a constant that plans are cached for. A selection is new at each call, has a
    list for each batch row, and is planned from its tensors alone.

    Attributes:
        counts: `(B, K, N)` int64, how many blocks each row of blocks keeps; at least one.
        block_indices: `(B, K, N, M)` int32, these blocks, ascending from the left, and −1 behind
            them. A causal selection ends each row i with block i.
    """

    counts: torch.Tensor
    block_indices: torch.Tensor

    @property
    def num_blocks(self) -> int:
        """N, blocks in each direction."""
        return self.counts.shape[2]

    def materialize(self) -> torch.Tensor:
        """Bool `(B, K, N, N)`, True for kept blocks; for tests and plots."""
        N, indices = self.num_blocks, self.block_indices.long()
        dense = torch.zeros(*self.counts.shape, N + 1, dtype=torch.bool, device=indices.device)
        return dense.scatter_(-1, indices.where(indices >= 0, N), True)[..., :N]

    def pattern(self, batch_row: int) -> BlockPattern:
        """The `BlockPattern` of one batch row, which lists K heads; a copy on the CPU."""
        return BlockPattern.from_mask(self.materialize()[batch_row])

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> BlockSelection:
        """The selection of the True entries of `mask` `(B, K, N, N)`, or of some of its rows.

        Args:
            mask: Every row has one True entry at least.
        """
        counts = mask.sum(-1)
        M = int(counts.max())
        is_used = torch.arange(M, device=mask.device) < counts.unsqueeze(-1)
        packed = torch.full(is_used.shape, -1, dtype=torch.int32, device=mask.device)
        kept = mask.nonzero()[:, -1].to(torch.int32)  # row by row, ascending
        return cls(counts, packed.masked_scatter_(is_used, kept))
