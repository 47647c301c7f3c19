"""Block-sparse attention as a module without parameters."""

from __future__ import annotations

from typing import Never

import torch
from dilated_core.modules.config import FORWARD_ARGUMENTS
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import nn

from dilated_sparse.attention import attend_checked
from dilated_sparse.modules.config import BlockSparseAttentionConfig
from dilated_sparse.pattern.rule import PatternRule


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
        self._rule, self._causal_rule = (
            PatternRule.of(config.pattern_type, config.sparsity_ratio, is_causal)
            for is_causal in (False, True)
        )

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

        See `block_sparse_attention`. Each document has the pattern of its own length. With
        `key_padding_mask` each batch row is the document from its first to its last visible key:
        the result there is that without padding, and 0 outside.

        Compiled with a symbolic S, one graph serves all lengths, documents and masks; `is_causal`,
        whether there are documents, and whether there is a mask have a graph each.
        """
        check_forward_names(self, unknown, FORWARD_ARGUMENTS, self.config)
        config = self.config
        return attend_checked(
            q,
            k,
            v,
            self._causal_rule if is_causal else self._rule,
            config.block_size,
            is_causal,
            config.scale,
            dropout_p=config.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            backend=config.backend,
        ).out

    def extra_repr(self) -> str:
        """The pattern and the options that differ from their defaults, for `repr`."""
        return show_options(self.config, "pattern_type", "sparsity_ratio")
