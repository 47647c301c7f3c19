"""Dilated self-attention with positions in its queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dilated_core import (
    DecodingCache,
    MultiheadConfig,
    MultiheadDilatedAttention,
    decode_step,
    decode_tokens,
)
from dilated_core.backends.contract import DecodingBackend, has_capability
from dilated_core.backends.registry import get_backend
from dilated_core.checks import check_bool
from torch import Tensor

from dilated_models.config import LongNetConfig
from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.layers.documents import Documents
from dilated_models.layers.key_history import KeyHistory
from dilated_models.layers.position_codes import AlibiPositions, PositionCode, encode_positions
from dilated_models.layers.selection_history import SelectionHistory

AttentionCache = DecodingCache | KeyHistory | SelectionHistory
"""What a block keeps of the tokens before, by the kind of its attention."""


class DilatedSelfAttention(MultiheadDilatedAttention):
    """Project, encode positions in q and k, attend, LayerNorm, project out.

    With the `attention_kind` of the config the attention inside may be another one than dilated.

    All but the positions is `dilated_core.MultiheadDilatedAttention`. They are encoded before the
    pattern selects rows, so each row has its absolute position in every branch.

    Args:
        config: Of the model.
        gamma_init: Gain of the initial weights; that of the config if None.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: LongNetConfig,
        *,
        gamma_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            MultiheadConfig(
                embed_dim=config.d_model,
                num_heads=config.nhead,
                num_kv_heads=config.num_kv_heads,
                layer_norm_eps=config.layer_norm_eps,
                gamma_init=config.gamma_init if gamma_init is None else gamma_init,
                device=device,
                dtype=dtype,
            ),
            config.attention,
        )
        self.has_branches, self.local_window = config.has_branches, config.local_window
        # The gate of learned block sparsity reads queries and keys without their positions.
        self.reads_unrotated = config.attention_kind == "block_sparse_adaptive"
        # The base class calls it with tensors and masks, as it calls its own.
        if not config.has_branches:
            self.attention: Any = config.build_attention(device=device, dtype=dtype)
        elif config.local_window:
            self.attention = _windowed_attention(config)

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        super().reset_parameters()
        gate = getattr(self.attention, "gate", None)  # only learned block sparsity has one
        if gate is not None:
            gate.reset_parameters()

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        rotation: PositionCode | None = None,
        *,
        is_causal: bool = False,
        documents: Documents | None = None,
        cache: AttentionCache | None = None,
        counts: Sequence[int] | None = None,
        context_parallel: ContextParallel | None = None,
    ) -> Tensor:
        """Attend within `x`, and with a cache also to the tokens before.

        Args:
            x: `(B, S, E)`; `(T, E)` with `documents`.
            rotation: Of the S positions; None leaves q and k unchanged.
            is_causal: Whether a position sees only itself and earlier ones.
            documents: Of packed positions, each of which sees only its own document.
            cache: Holds the tokens before, and then those of `x` too. Attention is then causal.
            counts: With a cache, how many positions of each sequence are not padding; None: all.
            context_parallel: If `x` is one rank's shard of a sequence; not with a cache.

        Returns:
            The shape of `x`.
        """
        q, k, v = self.project(x, x, x)
        before = (q, k)
        if isinstance(cache, SelectionHistory):
            q, k, v = encode_positions(q, k, v, rotation)
            out = cache.attend(q, k, v, before, counts, self.attention.decode)
            return self.combine(out.to(x.dtype))
        if cache is not None:
            # ALiBi's digits depend on the dtype.
            q, k, v = (y.to(cache.keys.dtype) for y in (q, k, v))
        elif isinstance(rotation, AlibiPositions) and not check_bool("is_causal", is_causal):
            raise ValueError(
                "is_causal is False; ALiBi's bias to both sides is no product of queries and keys, "
                'so call the model causally or build it with positions="rotary".'
            )
        q, k, v = encode_positions(q, k, v, rotation)
        if cache is not None:
            return self._combine(self._decode(q, k, v, cache, counts).to(x.dtype))
        cu_seqlens = None if documents is None else documents.cu_seqlens
        if context_parallel is not None:
            if self.local_window:
                raise ValueError(
                    f"local_window of the model is {self.local_window}, and context_parallel is "
                    f"given; attention over ranks has no window, so leave context_parallel out."
                )
            # The config of block-sparse attention has the pattern of each length.
            attention = self.attention
            out = context_parallel.attend(
                q,
                k,
                v,
                attention.pattern if self.has_branches else attention.config,
                is_causal=is_causal,
                cu_seqlens=cu_seqlens,
                scale=self.attention.config.scale,
                backend=self.attention.config.backend,
            )
            return self._combine(out)
        if self.reads_unrotated:
            out = self.attention(
                q, k, v, is_causal=is_causal, unrotated=before, cu_seqlens=cu_seqlens
            )
        else:
            out = self.attend(q, k, v, is_causal=is_causal, cu_seqlens=cu_seqlens)
        return self._combine(out)

    def _combine(self, out: Tensor) -> Tensor:
        """`combine` of the channels that hold values."""
        return self.combine(out[..., : self.head_dim])

    def _decode(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: DecodingCache | KeyHistory,
        counts: Sequence[int] | None,
    ) -> Tensor:
        if isinstance(cache, KeyHistory):
            return cache.attend(q, k, v, counts, self.attend)
        scale, backend = self.attention.config.scale, self.attention.config.backend
        # A named backend is used, whether it has a kernel for single tokens or not.
        has_kernel = backend == "auto" or has_capability(get_backend(backend), DecodingBackend)
        if counts is None and q.shape[1] == 1 and has_kernel:
            return decode_step(q, k, v, cache, scale=scale, backend=backend)
        return decode_tokens(q, k, v, cache, lengths=counts, scale=scale, backend=backend)


def _windowed_attention(config: LongNetConfig) -> Any:
    """The module for the branches and a sliding window.

    Raises:
        ImportError: If dilated-sparse is not installed.
    """
    try:
        from dilated_sparse import WindowedDilatedAttention
    except ModuleNotFoundError as error:
        raise ImportError(
            f"local_window needs dilated-sparse, and {error.name} is not installed: "
            f"pip install 'dilated-models[sparse]'"
        ) from error
    return WindowedDilatedAttention(
        config.segment_lengths,
        config.dilation_rates,
        window=config.local_window,
        head_offsets=config.head_offsets,
        padding=config.padding,
        backend=config.backend,
    )
