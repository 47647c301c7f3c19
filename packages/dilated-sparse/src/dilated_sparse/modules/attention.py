"""Block-sparse attention as a module without parameters."""

from __future__ import annotations

from itertools import pairwise
from typing import Never

import torch
from dilated_core.checks import check_tensor
from dilated_core.inputs import check_cu_seqlens, document_bounds
from dilated_core.modules.config import FORWARD_ARGUMENTS
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import nn

from dilated_sparse.attention import block_sparse_attention
from dilated_sparse.modules.config import BlockSparseAttentionConfig


class BlockSparseAttention(nn.Module):
    """`block_sparse_attention` with a kind of pattern and its options, for sequences of any length.

    Args:
        config: A `BlockSparseAttentionConfig`. Or, instead of it, its options by name, which that
            class explains.

    Raises:
        TypeError, ValueError: As `BlockSparseAttentionConfig` does.

    Example:
        >>> attention = BlockSparseAttention(pattern_type="local_window", sparsity_ratio=0.2)
        >>> q = k = v = torch.randn(1, 1000, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 1000, 4, 16])
    """

    @from_options(
        BlockSparseAttentionConfig, elsewhere=FORWARD_ARGUMENTS, config=BlockSparseAttentionConfig
    )
    def __init__(self, config: BlockSparseAttentionConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`.

        See `block_sparse_attention`. With `cu_seqlens` the pattern is that of the longest document,
        and shorter ones take its first rows and columns.
        """
        check_forward_names(self, unknown, FORWARD_ARGUMENTS, self.config)
        check_tensor("q", q)
        config = self.config
        seq_len = q.shape[1] if q.dim() == 4 else q.shape[0]
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens)
            seq_len = max(b - a for a, b in pairwise(document_bounds(cu_seqlens, q.shape[0])))
        return block_sparse_attention(
            q,
            k,
            v,
            config.pattern_for(seq_len, is_causal=is_causal),
            config.block_size,
            is_causal,
            config.scale,
            dropout_p=config.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            backend=config.backend,
        )

    def extra_repr(self) -> str:
        """The pattern and the options that differ from their defaults, for `repr`."""
        return show_options(self.config, "pattern_type", "sparsity_ratio")
