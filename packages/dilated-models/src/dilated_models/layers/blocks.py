"""One block of a LongNet decoder: attention and feed-forward, each around a residual."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from dilated_core.positions.rotary import Rotation
from torch import Tensor, nn

from dilated_models.config import LongNetConfig
from dilated_models.layers.block_cache import BlockCache
from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.layers.convolution import CausalConvolution
from dilated_models.layers.documents import Documents
from dilated_models.layers.feed_forward import FeedForward
from dilated_models.layers.self_attention import DilatedSelfAttention


class SelfAttentionBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed_forward(LayerNorm(x)).

    Each half has a LayerNorm before it and another inside it (MAGNETO, arXiv 2210.06423, figure 2).
    Dropout acts on what each half adds to the residual, and inside the feed-forward. With
    `key_conv`, a `CausalConvolution` stands between the first LayerNorm and the attention.

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
        self.key_conv = (
            CausalConvolution(config, device=device, dtype=dtype) if config.key_conv else None
        )
        self.attention = DilatedSelfAttention(config, device=device, dtype=dtype)
        self.feed_forward_norm = layer_norm()
        self.feed_forward = FeedForward(config, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.attention_norm.reset_parameters()
        if self.key_conv is not None:
            self.key_conv.reset_parameters()
        self.attention.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.reset_parameters()

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        is_causal: bool = True,
        documents: Documents | None = None,
        cache: BlockCache | None = None,
        counts: Sequence[int] | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Map `(B, S, d_model)` to the same shape; arguments as in `DilatedSelfAttention`."""
        normed = self.attention_norm(x)
        if self.key_conv is not None and context_parallel is not None:
            cu_seqlens = None if documents is None else documents.cu_seqlens
            normed = self.key_conv(
                normed, rows_before=partial(context_parallel.rows_before, cu_seqlens=cu_seqlens)
            )
        elif self.key_conv is not None:
            inputs, before = normed, None if cache is None else cache.inputs
            positions = None if documents is None else documents.positions
            normed = self.key_conv(inputs, before=before, positions=positions)
            if cache is not None:
                cache.keep_inputs(inputs, counts)
        decoding = None if cache is None else cache.attention
        x = x + self.dropout(
            self.attention(
                normed,
                rotation,
                is_causal=is_causal,
                documents=documents,
                cache=decoding,
                counts=counts,
                context_parallel=context_parallel,
            )
        )
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
