"""NSA in the place of a block's self-attention: its projections are its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from dilated_core.positions.rotary import Rotation, check_decay_range, rotation_at
from torch import Tensor, nn

from dilated_models.config import LongNetConfig
from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.layers.documents import Documents
from dilated_models.layers.key_history import KeyHistory
from dilated_models.layers.position_codes import PositionCode
from dilated_models.layers.self_attention import AttentionCache


class NativeSparseSelfAttention(nn.Module):
    """`dilated_sparse.NativeSparseAttention`, called as `DilatedSelfAttention` is.

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
        super().__init__()
        self.config = config
        self.attention: Any = config.build_attention(
            gamma_init=gamma_init, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        self.attention.reset_parameters()

    def forward(
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
        """Attend within `x`, causally; see `DilatedSelfAttention`.

        A cache holds the inputs of all tokens, and each call computes all keys anew.
        """
        assert context_parallel is None  # a model refuses it
        if cache is not None:
            assert isinstance(cache, KeyHistory)
            return self._continue(x, cache, counts)
        assert rotation is None or isinstance(rotation, Rotation)  # a config refuses ALiBi
        cu_seqlens = None if documents is None else documents.cu_seqlens
        return self.attention(
            x, x, x, is_causal=is_causal, cu_seqlens=cu_seqlens, rotation=rotation
        )

    def _continue(self, x: Tensor, inputs: KeyHistory, counts: Sequence[int] | None) -> Tensor:
        """The rows of the new tokens `(B, n, d_model)` of each text."""
        rows, out = x.to(inputs.keys.dtype).unsqueeze(2), torch.zeros_like(x)
        for texts, start, end in inputs.append(rows, rows[..., :0], counts):
            whole = inputs.keys[texts, :end, 0]
            rotation = self._rotation(end, whole)
            result = self.attention(whole, whole, whole, is_causal=True, rotation=rotation)
            out[texts, : end - start] = result[:, start:].to(x.dtype)
        return out

    def _rotation(self, seq_len: int, x: Tensor) -> Rotation | None:
        """Factors of a whole text, with the center in its middle, as the model makes them."""
        config, center = self.config, seq_len // 2
        if config.positions == "none":
            return None
        scale_base = config.xpos_scale_base if config.positions == "xpos" else None
        if scale_base is not None:
            check_decay_range(center, scale_base, x.dtype)
        return rotation_at(
            torch.arange(seq_len, device=x.device),
            config.head_dim,
            scale_base=scale_base,
            center=center,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )
