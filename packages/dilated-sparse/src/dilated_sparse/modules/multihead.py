"""Block-sparse attention with the projections of a transformer layer."""

from __future__ import annotations

from dilated_core import DilatedAttentionConfig, MultiheadConfig, MultiheadDilatedAttention
from dilated_core.modules.config import MULTIHEAD_ARGUMENTS
from dilated_core.modules.options import from_options

from dilated_sparse.modules.attention import BlockSparseAttention
from dilated_sparse.modules.config import (
    BlockSparseAttentionConfig,
    BlockSparseMultiheadArguments,
)


class BlockSparseMultiheadAttention(MultiheadDilatedAttention):
    """`dilated_core.MultiheadDilatedAttention` with block-sparse attention inside.

    Projections, initialisation, masks, `from_multihead_attention` and the result are those of that
    class.

    Args:
        multihead_config, attention_config: A `MultiheadConfig` and a `BlockSparseAttentionConfig`.
            Or, instead of them, their options by name, which those classes explain; `embed_dim` and
            `num_heads` are required and may be positional.

    Raises:
        TypeError, ValueError: As `MultiheadConfig` and `BlockSparseAttentionConfig` do.

    Example:
        >>> import torch
        >>> mha = BlockSparseMultiheadAttention(64, 4, sparsity_ratio=0.2, block_size=16)
        >>> x = torch.randn(2, 500, 64)
        >>> mha(x, x, x, is_causal=True).shape
        torch.Size([2, 500, 64])
    """

    @from_options(
        BlockSparseMultiheadArguments,
        elsewhere=MULTIHEAD_ARGUMENTS,
        multihead_config=MultiheadConfig,
        attention_config=BlockSparseAttentionConfig,
    )
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, multihead_config: MultiheadConfig, attention_config: BlockSparseAttentionConfig
    ) -> None:
        super().__init__(multihead_config, DilatedAttentionConfig())
        # The base class calls it with tensors and masks, as it calls its own.
        self.attention = BlockSparseAttention(attention_config)  # pyright: ignore
