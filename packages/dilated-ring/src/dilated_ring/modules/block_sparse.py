"""Block-sparse attention of a shard of the sequence as a module without parameters."""

from __future__ import annotations

from typing import Any

import torch
from dilated_core.modules.options import from_options, show_options

from dilated_ring.block_attention import (
    ring_block_sparse_attention,
    simulated_ring_block_sparse_attention,
)
from dilated_ring.modules.config import (
    RING_ARGUMENTS,
    RingBlockSparseArguments,
    RingBlockSparseConfig,
)
from dilated_ring.modules.ring import StandardRingAttention
from dilated_ring.sharding.group import Group


class RingBlockSparseAttention(StandardRingAttention):
    """`ring_block_sparse_attention` with its pattern and options as a module without parameters.

    Ranks, groups, `ring_size` in one process and `forward` are those of `StandardRingAttention`.

    Args:
        config: A `RingBlockSparseConfig`. Or, instead of it, its options by name, which that class
            explains; `block_pattern` and `block_size` may be positional.
        group: The ranks that share the sequence, see `ring_dilated_attention`.

    Raises:
        TypeError, ValueError: As `RingBlockSparseConfig` and `StandardRingAttention` do.

    Example:
        >>> # With dilated_sparse: RingBlockSparseAttention(SparsePatternConfig(sparsity_ratio=0.1))
        >>> ring = RingBlockSparseAttention(
        ...     segment_lengths=[64], dilation_rates=[1], block_size=16, ring_size=4
        ... )
        >>> q = k = v = torch.randn(1, 1000, 4, 16)
        >>> ring(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 16])
    """

    @from_options(RingBlockSparseArguments, elsewhere=RING_ARGUMENTS, config=RingBlockSparseConfig)
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride] - it has more options
        self, config: RingBlockSparseConfig, *, group: Group | tuple[Group, Group] = None
    ) -> None:
        super().__init__(config, group=group)
        self.config: RingBlockSparseConfig = config  # pyright: ignore

    def _over_ranks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        return ring_block_sparse_attention(q, k, v, self.config.blocks_of(q.shape[-2]), **options)

    def _in_process(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        blocks = self.config.blocks_of(q.shape[-2])
        return simulated_ring_block_sparse_attention(q, k, v, blocks, **options)

    def extra_repr(self) -> str:
        """What determines the blocks, and the options that differ from their defaults."""
        if self.config.block_pattern is None:
            return super().extra_repr()
        shown = show_options(self.config, "block_pattern")
        return f"{shown}, in one process" if self._is_simulated() else shown
