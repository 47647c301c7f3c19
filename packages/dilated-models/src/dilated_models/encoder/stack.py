"""LongNetEncoder: a stack of encoder layers on embeddings."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Never, cast

import torch
from dilated_core.checks import check_float_dtype, check_tensor
from dilated_core.inputs import check_cu_seqlens
from dilated_core.modules.options import check_forward_names, from_options, show_options
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
)

from dilated_models.encoder.config import STACK_ELSEWHERE, EncoderArguments, EncoderConfig
from dilated_models.encoder.layer import DilatedTransformerEncoderLayer
from dilated_models.encoder.names import accept_published_names
from dilated_models.encoder.rotations import rotation_of


class LongNetEncoder(nn.Module):
    """LongNet's encoder on embeddings (arXiv 2307.02486): MAGNETO layers and a LayerNorm.

    It adds no positions to the embeddings; callers may. Weights are drawn as MAGNETO draws
    them, with γ = √(log 2L) for L layers. `load_state_dict` accepts torchscale's names too.

    Args:
        config: An `EncoderConfig`. Or, instead of it, its options by name.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError, ValueError: As `EncoderConfig` does.

    Example:
        >>> encoder = LongNetEncoder(d_model=32, nhead=4, num_layers=2, dim_feedforward=64,
        ...                          segment_lengths=[8, 32], dilation_rates=[1, 4])
        >>> encoder(torch.randn(2, 50, 32)).shape
        torch.Size([2, 50, 32])
    """

    @from_options(EncoderArguments, elsewhere=STACK_ELSEWHERE, config=EncoderConfig)
    def __init__(
        self,
        config: EncoderConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dtype is not None:
            check_float_dtype(dtype)
        self.config = config
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            DilatedTransformerEncoderLayer(config.layer(i), device=device, dtype=dtype)
            for i in range(config.num_layers)
        )
        self.layer_norm = (
            nn.LayerNorm(config.d_model, eps=config.layer_norm_eps, device=device, dtype=dtype)
            if config.final_layer_norm
            else nn.Identity()
        )
        self.register_load_state_dict_pre_hook(accept_published_names)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    def reset_parameters(self) -> None:
        """Draw all weights anew, for instance after `to_empty`."""
        for layer in self.layers:
            cast(DilatedTransformerEncoderLayer, layer).reset_parameters()
        if isinstance(self.layer_norm, nn.LayerNorm):
            self.layer_norm.reset_parameters()

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        cu_seqlens: Tensor | None = None,
        on_state: Callable[[Tensor], None] | None = None,
        **unknown: Never,
    ) -> Tensor:
        """Map embeddings to contextual embeddings.

        Args:
            x: `(B, S, d_model)`; `(T, d_model)` with `cu_seqlens`.
            key_padding_mask: `(B, S)`, True for positions that nobody sees.
            is_causal: Whether a position sees no later one.
            cu_seqlens: `(N + 1,)`, where each of N sequences that are packed one after another
                begins, and where the last one ends. Each gets what it gets alone.
            on_state: Called with each of L + 1 hidden states before the final LayerNorm: the
                inputs, then the output of each layer. A caller that keeps a part of each needs no
                memory for all.

        Returns:
            The shape of `x`, after the final LayerNorm.

        Raises:
            TypeError: If an argument has the wrong type or is unknown.
            ValueError: If a shape does not fit.
        """
        known = ("x", "key_padding_mask", "is_causal", "cu_seqlens", "on_state")
        check_forward_names(self, unknown, known, self.config)
        check_tensor("x", x)
        dims, rows = (3, "batch, sequence") if cu_seqlens is None else (2, "positions")
        if x.dim() != dims or x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; it must be ({rows}, {self.config.d_model})."
            )
        if cu_seqlens is not None:
            check_cu_seqlens(cu_seqlens)
        recompute = (
            self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        )
        rotation = rotation_of(self.config, x, cu_seqlens)
        x = self.dropout(x)
        if on_state is not None:
            on_state(x)
        for layer in self.layers:
            call = partial(
                layer,
                src_key_padding_mask=key_padding_mask,
                is_causal=is_causal,
                cu_seqlens=cu_seqlens,
                rotation=rotation,
            )
            x = checkpoint(call, x, use_reentrant=False) if recompute else call(x)
            if on_state is not None:
                on_state(x)
        return self.layer_norm(x)

    def extra_repr(self) -> str:
        """The options that are not seen in the submodules, for `repr`."""
        return show_options(self.config, "d_model", "nhead", "num_layers")
