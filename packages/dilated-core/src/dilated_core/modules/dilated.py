"""Dilated attention as a module without parameters."""

from __future__ import annotations

from typing import Never

import torch
from torch import nn

from dilated_core.attention import dilated_attention
from dilated_core.modules.config import (
    FORWARD_ARGUMENTS,
    DilatedAttentionArguments,
    DilatedAttentionConfig,
)
from dilated_core.modules.options import check_forward_names, from_options, show_options


class DilatedAttention(nn.Module):
    """`dilated_attention` with its pattern and options as a module without parameters.

    Args:
        config: A `DilatedAttentionConfig`. Or, instead of it, its options by name, which that class
            explains; `segment_lengths` and `dilation_rates` are required and may be positional.

    Raises:
        TypeError, ValueError: As `DilatedAttentionConfig` does.

    Example:
        >>> attention = DilatedAttention(segment_lengths=[8, 32], dilation_rates=[1, 4])
        >>> q = k = v = torch.randn(1, 64, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 64, 4, 16])
        >>> DilatedAttention(attention.config)
        DilatedAttention(segment_lengths=[8, 32], dilation_rates=[1, 4])
    """

    @from_options(
        DilatedAttentionArguments, elsewhere=FORWARD_ARGUMENTS, config=DilatedAttentionConfig
    )
    def __init__(self, config: DilatedAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.pattern = config.pattern

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
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`; see `dilated_attention`."""
        check_forward_names(self, unknown, FORWARD_ARGUMENTS, self.config)
        return dilated_attention(
            q,
            k,
            v,
            self.pattern,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            **self.config.call_options(is_training=self.training),
        )

    def extra_repr(self) -> str:
        """The branches and the options that differ from their defaults, for `repr`."""
        return show_options(self.config, "segment_lengths", "dilation_rates")
