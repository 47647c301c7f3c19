"""One block of a LongNet: attention, cross-attention and feed-forward around residuals."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dilated_models.config import LongNetConfig
from dilated_models.layers.block_cache import BlockCache
from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.layers.convolution import CausalConvolution
from dilated_models.layers.cross_attention import CrossAttention, Memory
from dilated_models.layers.documents import Documents
from dilated_models.layers.drop_path import drop_path
from dilated_models.layers.feed_forward import FeedForward
from dilated_models.layers.native_sparse import NativeSparseSelfAttention
from dilated_models.layers.position_codes import PositionCode
from dilated_models.layers.self_attention import DilatedSelfAttention


class SelfAttentionBlock(nn.Module):
    """x + attention(LayerNorm(x)), then x + feed_forward(LayerNorm(x)).

    With `has_memory`, x + cross_attention(LayerNorm(x)) stands between the two. Each half has a
    LayerNorm before it and another inside it (MAGNETO, arXiv 2210.06423, figure 2). Dropout and
    drop-path act on what each part adds to the residual, and dropout inside the feed-forward. With
    `key_conv`, a `CausalConvolution` stands between the first LayerNorm and the attention.

    Args:
        config: Of the model.
        has_memory: Whether the block attends to another sequence too.
        gamma_init: Gain of the initial weights; that of the config if None.
        drop_path: Probability that training skips a half for a sequence.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        has_memory: bool = False,
        gamma_init: float | None = None,
        drop_path: float = 0.0,
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
        kind = NativeSparseSelfAttention if config.attention_kind == "nsa" else DilatedSelfAttention
        self.attention = kind(config, gamma_init=gamma_init, device=device, dtype=dtype)
        self.cross_attention_norm = layer_norm() if has_memory else None
        self.cross_attention = (
            CrossAttention(
                config.d_model,
                config.nhead,
                num_kv_heads=config.num_kv_heads,
                backend=config.backend,
                device=device,
                dtype=dtype,
            )
            if has_memory
            else None
        )
        self.feed_forward_norm = layer_norm()
        self.feed_forward = FeedForward(config, gamma_init=gamma_init, device=device, dtype=dtype)
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.attention_norm.reset_parameters()
        if self.key_conv is not None:
            self.key_conv.reset_parameters()
        self.attention.reset_parameters()
        if self.cross_attention_norm is not None and self.cross_attention is not None:
            self.cross_attention_norm.reset_parameters()
            self.cross_attention.reset_parameters()
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.reset_parameters()

    def forward(
        self,
        x: Tensor,
        rotation: PositionCode | None = None,
        is_causal: bool = True,
        documents: Documents | None = None,
        cache: BlockCache | None = None,
        counts: Sequence[int] | None = None,
        context_parallel: ContextParallel | None = None,
        memory: Memory | None = None,
    ) -> Tensor:
        """Map `(B, S, d_model)` to the same shape; arguments as in `DilatedSelfAttention`.

        `memory` is what the cross-attention of a block that has one attends to.
        """
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
        attended = self.attention(
            normed,
            rotation,
            is_causal=is_causal,
            documents=documents,
            cache=decoding,
            counts=counts,
            context_parallel=context_parallel,
        )
        x = x + self._added(attended, documents)
        if self.cross_attention_norm is not None and self.cross_attention is not None:
            assert memory is not None  # a model gives one to each block that has cross-attention
            seen = self.cross_attention(
                self.cross_attention_norm(x),
                memory,
                cu_seqlens=None if documents is None else documents.cu_seqlens,
                cache=None if cache is None else cache.memory,
                counts=counts,
                context_parallel=context_parallel,
            )
            x = x + self._added(seen, documents)
        return x + self._added(self.feed_forward(self.feed_forward_norm(x)), documents)

    def _added(self, x: Tensor, documents: Documents | None) -> Tensor:
        """What a half adds to the residual, after dropout."""
        x = self.dropout(x)
        if not self.training or not self.drop_path:
            return x
        return drop_path(x, self.drop_path, None if documents is None else documents.cu_seqlens)
