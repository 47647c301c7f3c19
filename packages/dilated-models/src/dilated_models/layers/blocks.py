"""One block of a LongNet decoder: attention and feed-forward, each around a residual."""

from __future__ import annotations

import torch
from dilated_core.positions.rotary import Rotation
from torch import Tensor, nn

from dilated_models.config import LongNetConfig
from dilated_models.layers.feed_forward import FeedForward
from dilated_models.layers.self_attention import DilatedSelfAttention


class SelfAttentionBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed_forward(LayerNorm(x)).

    Each half has a LayerNorm before it and another inside it (MAGNETO, arXiv 2210.06423, figure 2).
    Dropout acts on what each half adds to the residual, and inside the feed-forward.

    Args:
        config: Of the model.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

        def layer_norm() -> nn.LayerNorm:
            eps = config.layer_norm_eps
            return nn.LayerNorm(config.d_model, eps=eps, device=device, dtype=dtype)

        self.attention_norm = layer_norm()
        self.attention = DilatedSelfAttention(config, device=device, dtype=dtype)
        self.feed_forward_norm = layer_norm()
        self.feed_forward = FeedForward(config, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.attention_norm.reset_parameters()
        self.attention.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.reset_parameters()

    def forward(
        self, x: Tensor, rotation: Rotation | None = None, is_causal: bool = True
    ) -> Tensor:
        """Map `(B, S, d_model)` to the same shape; arguments as in `DilatedSelfAttention`."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotation, is_causal=is_causal))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
