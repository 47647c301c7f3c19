"""Dilated self-attention with positions in its queries and keys."""

from __future__ import annotations

import torch
from dilated_core import MultiheadConfig, MultiheadDilatedAttention
from dilated_core.positions.rotary import Rotation, rotate
from torch import Tensor

from dilated_models.config import LongNetConfig
from dilated_models.layers.documents import Documents


class DilatedSelfAttention(MultiheadDilatedAttention):
    """Project, rotate q and k, attend, LayerNorm, project out.

    All but the rotation is `dilated_core.MultiheadDilatedAttention`. Rotation comes before the
    pattern selects positions, so each row is turned by its absolute position in every branch.

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
        super().__init__(
            MultiheadConfig(
                embed_dim=config.d_model,
                num_heads=config.nhead,
                layer_norm_eps=config.layer_norm_eps,
                gamma_init=config.gamma_init,
                device=device,
                dtype=dtype,
            ),
            config.attention,
        )

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        *,
        is_causal: bool = False,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attend within `x`.

        Args:
            x: `(B, S, E)`; `(T, E)` with `documents`.
            rotation: Of the S positions; None leaves q and k unchanged.
            is_causal: Whether a position sees only itself and earlier ones.
            documents: Of packed positions, each of which sees only its own document.

        Returns:
            The shape of `x`.
        """
        q, k, v = self.project(x, x, x)
        if rotation is not None:
            q = rotate(q, rotation.q_cos, rotation.q_sin)
            k = rotate(k, rotation.k_cos, rotation.k_sin)
        cu_seqlens = None if documents is None else documents.cu_seqlens
        return self.combine(self.attend(q, k, v, is_causal=is_causal, cu_seqlens=cu_seqlens))
