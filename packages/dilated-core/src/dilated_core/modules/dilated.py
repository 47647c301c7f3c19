"""Dilated attention as a module without parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dilated_core.attention import dilated_attention
from dilated_core.modules.config import DilatedAttentionConfig
from dilated_core.pattern.branches import DilatedPattern, HeadOffsets, Padding


class DilatedAttention(nn.Module):
    """`dilated_attention` with its pattern and options as a module without parameters.

    Args:
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
        head_offsets: `"interleaved"` or `"blocked"`, see `DilatedPattern`.
        padding: `"masked"` or `"attended"`, see `DilatedPattern`.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        max_workspace_bytes: Limit of what forward allocates, see `dilated_attention`.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError, ValueError: As `DilatedPattern` does.

    Example:
        >>> attention = DilatedAttention(segment_lengths=[8, 32], dilation_rates=[1, 4])
        >>> q = k = v = torch.randn(1, 64, 4, 16)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 64, 4, 16])
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        head_offsets: HeadOffsets = "interleaved",
        padding: Padding = "masked",
        scale: float | None = None,
        dropout: float = 0.0,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.config = DilatedAttentionConfig(
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            head_offsets=head_offsets,
            padding=padding,
            scale=scale,
            dropout=dropout,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
        )
        self.pattern: DilatedPattern = self.config.pattern

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`; see `dilated_attention`."""
        return dilated_attention(
            q,
            k,
            v,
            self.pattern,
            is_causal=is_causal,
            scale=self.config.scale,
            dropout_p=self.config.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
            max_workspace_bytes=self.config.max_workspace_bytes,
            backend=self.config.backend,
        )

    def extra_repr(self) -> str:
        """The pattern, for `repr`."""
        c = self.config
        parts = [
            f"segment_lengths={list(c.segment_lengths)}, dilation_rates={list(c.dilation_rates)}"
        ]
        defaults = {"head_offsets": "interleaved", "padding": "masked", "scale": None}
        defaults |= {"dropout": 0.0, "max_workspace_bytes": None, "backend": "auto"}
        for name, default in defaults.items():
            if getattr(c, name) != default:
                parts.append(f"{name}={getattr(c, name)!r}")
        return ", ".join(parts)
