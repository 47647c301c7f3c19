"""One block of a LongNet decoder: attention and feed-forward, each around a residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from dilated_core.positions.rotary import Rotation
from torch import Tensor, nn

from dilated_models.layers.feed_forward import Activation, FeedForward
from dilated_models.layers.self_attention import DilatedSelfAttention


class SelfAttentionBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed_forward(LayerNorm(x)).

    The pre-LayerNorms stand before each half and the sub-LayerNorms inside it (MAGNETO, arXiv
    2210.06423, figure 2). Dropout falls on what each half adds to the residual, and between the
    two layers of the feed-forward.

    Args:
        d_model: Width.
        nhead: Number of query heads; divides `d_model`.
        dim_feedforward: Width of the feed-forward.
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch.
        dropout: Probability, in [0, 1).
        activation: Of the feed-forward.
        layer_norm_eps: Of all four LayerNorms.
        gamma_init: Initial gain of the value, output and feed-forward weights.
        head_offsets: As in `dilated_core.DilatedPattern`.
        padding: As in `dilated_core.DilatedPattern`.
        backend: As in `dilated_core.dilated_attention`.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        dropout: float = 0.0,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        gamma_init: float = 1.0,
        head_offsets: Literal["interleaved", "blocked"] = "interleaved",
        padding: Literal["masked", "attended"] = "masked",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model, eps=layer_norm_eps, device=device, dtype=dtype)
        self.attention = DilatedSelfAttention(
            d_model,
            nhead,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            head_offsets=head_offsets,
            padding=padding,
            backend=backend,
            device=device,
            dtype=dtype,
        )
        self.feed_forward_norm = nn.LayerNorm(
            d_model, eps=layer_norm_eps, device=device, dtype=dtype
        )
        self.feed_forward = FeedForward(
            d_model,
            dim_feedforward,
            dropout=dropout,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            device=device,
            dtype=dtype,
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, rotation: Rotation | None = None, is_causal: bool = True
    ) -> Tensor:
        """Map `(B, S, d_model)` to the same shape; arguments as in `DilatedSelfAttention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, is_causal=is_causal))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
