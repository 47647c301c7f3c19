"""The module whose branches follow the length of each call."""

from __future__ import annotations

from typing import Never

import torch
from torch import nn

from dilated_core.attention import dilated_attention
from dilated_core.checks import check_head_range
from dilated_core.modules.config import DYNAMIC_ARGUMENTS, DynamicDilatedAttentionConfig
from dilated_core.modules.options import check_forward_names, from_options, show_options
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.pattern.ladder import select_segments


class DynamicDilatedAttention(nn.Module):
    """Dilated attention whose branches `select_segments` chooses for the length of each call.

    The module has no parameters and builds no modules. The choice depends on shapes and dtypes
    only, so equal inputs have equal results on every machine.

    Args:
        config: A `DynamicDilatedAttentionConfig`. Or, instead of it, its options by name, which
            that class explains; none is required.

    Raises:
        TypeError, ValueError: As `DynamicDilatedAttentionConfig` does.

    Example:
        >>> attention = DynamicDilatedAttention(first_segment_length=16)
        >>> q = k = v = torch.randn(1, 50, 4, 8)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 50, 4, 8])
        >>> attention.pattern_for(q, k).branches[-1]
        Branch(segment_length=64, dilation_rate=4)
    """

    @from_options(
        DynamicDilatedAttentionConfig,
        elsewhere=DYNAMIC_ARGUMENTS,
        config=DynamicDilatedAttentionConfig,
    )
    def __init__(self, config: DynamicDilatedAttentionConfig) -> None:
        super().__init__()
        self.config = config

    def pattern_for(self, q: torch.Tensor, k: torch.Tensor) -> DilatedPattern:
        """The pattern that a call with q `(B, S, H, D)` and k `(B, S, H_kv, D)` uses."""
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must have the four dimensions "
                    f"(batch, sequence, heads, head_dim)."
                )
        H, H_kv = max(1, q.shape[2]), max(1, k.shape[2])
        # A part of the heads has the branches that all heads have together.
        _, total = check_head_range(self.config.head_range, H)
        segments = select_segments(
            max(1, q.shape[1]),
            total,
            num_kv_heads=max(1, total * H_kv // H),
            head_dim=max(1, k.shape[3]),
            dtype=k.dtype,
            first_segment_length=self.config.first_segment_length,
            growth=self.config.growth,
            keep_every_position=self.config.keep_every_position,
            memory_budget=self.config.memory_budget,
        )
        return self.config.pattern_of(*segments)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`; see `dilated_attention`.

        There is no `cu_seqlens`: the documents of a packed batch differ in length, and one choice
        of branches for all would give a document another result than it has alone.
        """
        check_forward_names(self, unknown, ("is_causal", "key_padding_mask"), self.config)
        return dilated_attention(
            q,
            k,
            v,
            self.pattern_for(q, k),
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            **self.config.call_options(is_training=self.training),
        )

    def extra_repr(self) -> str:
        """The growth and the options that differ from their defaults, for `repr`."""
        return show_options(self.config, "first_segment_length", "growth")
