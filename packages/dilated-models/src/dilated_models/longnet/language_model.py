"""LongNetLM: embedding, blocks, LayerNorm, output layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from dilated_core.positions.rotary import Rotation, check_decay_range, rotation_at
from torch import Tensor, nn
from torch.utils.checkpoint import (
    checkpoint,  # pyright: ignore[reportUnknownVariableType]
)

from dilated_models.layers.blocks import SelfAttentionBlock
from dilated_models.layers.feed_forward import Activation
from dilated_models.longnet.config import LongNetConfig, PositionKind


class LongNetLM(nn.Module):
    """LongNet language model (arXiv 2307.02486, section 4.1): a MAGNETO decoder with xPos.

    Embeddings are drawn from a normal of standard deviation d_model^−½, as is an output layer of
    its own. Query and key weights are drawn with Xavier's uniform rule and gain 1/√2, values with
    γ/√2, attention outputs and feed-forwards with γ = √(log 2L) for L blocks; biases are zero.

    Args:
        num_tokens: Vocabulary size; 256 for bytes.
        d_model: Width of the model.
        nhead: Query heads; divides `d_model`.
        num_encoder_layers: 0. The model is decoder-only.
        num_decoder_layers: Number of blocks.
        dim_feedforward: Width of the feed-forward halves.
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        dropout: As in `LongNetConfig`, which documents the remaining arguments too.
        activation: `"relu"` or `"gelu"`.
        layer_norm_eps: Of every LayerNorm.
        head_offsets: `"interleaved"` or `"blocked"`.
        padding: `"masked"` or `"attended"`.
        positions: `"xpos"`, `"rotary"` or `"none"`.
        xpos_scale_base: In tokens.
        tie_embeddings: Share the embedding's weight with the output layer.
        scale_embedding: Multiply embeddings by √d_model.
        final_layer_norm: LayerNorm before the output layer.
        activation_checkpointing: Recompute blocks in the backward pass.
        backend: As in `dilated_core.dilated_attention`.
        device: Of the parameters.
        dtype: Of the parameters; a floating-point dtype.

    Raises:
        TypeError: As `LongNetConfig`.
        ValueError: As `LongNetConfig`.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=2,
        ...                   dim_feedforward=64, segment_lengths=[8, 16], dilation_rates=[1, 2])
        >>> model(torch.zeros(1, 20, dtype=torch.int64)).shape
        torch.Size([1, 20, 256])
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        d_model: int = 768,
        nhead: int = 12,
        num_encoder_layers: int = 0,
        num_decoder_layers: int = 12,
        dim_feedforward: int = 3072,
        segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[int] = (1, 2, 4, 6, 12),
        dropout: float = 0.0,
        activation: Activation = "relu",
        layer_norm_eps: float = 1e-5,
        head_offsets: Literal["interleaved", "blocked"] = "interleaved",
        padding: Literal["masked", "attended"] = "masked",
        positions: PositionKind = "xpos",
        xpos_scale_base: float = 512.0,
        tie_embeddings: bool = False,
        scale_embedding: bool = True,
        final_layer_norm: bool = True,
        activation_checkpointing: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = LongNetConfig(
            num_tokens=num_tokens,
            d_model=d_model,
            nhead=nhead,
            num_encoder_layers=num_encoder_layers,
            num_decoder_layers=num_decoder_layers,
            dim_feedforward=dim_feedforward,
            segment_lengths=segment_lengths,
            dilation_rates=dilation_rates,
            dropout=dropout,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            head_offsets=head_offsets,
            padding=padding,
            positions=positions,
            xpos_scale_base=xpos_scale_base,
            tie_embeddings=tie_embeddings,
            scale_embedding=scale_embedding,
            final_layer_norm=final_layer_norm,
            activation_checkpointing=activation_checkpointing,
            backend=backend,
        )
        self.config = config
        self.embedding = nn.Embedding(num_tokens, d_model, device=device, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            SelfAttentionBlock(
                d_model,
                nhead,
                dim_feedforward,
                config.segment_lengths,
                config.dilation_rates,
                dropout=dropout,
                activation=activation,
                layer_norm_eps=layer_norm_eps,
                gamma_init=config.gamma_init,
                head_offsets=head_offsets,
                padding=padding,
                backend=backend,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_decoder_layers)
        )
        self.final_norm = (
            nn.LayerNorm(d_model, eps=layer_norm_eps, device=device, dtype=dtype)
            if final_layer_norm
            else nn.Identity()
        )
        self.output = nn.Linear(d_model, num_tokens, bias=False, device=device, dtype=dtype)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        if tie_embeddings:
            self.output.weight = self.embedding.weight
        else:
            nn.init.normal_(self.output.weight, std=d_model**-0.5)

    @classmethod
    def from_config(
        cls,
        config: LongNetConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LongNetLM:
        """Build the model a configuration describes, with freshly drawn weights."""
        return cls(**config.to_dict(), device=device, dtype=dtype)

    def forward(
        self, tokens: Tensor, is_causal: bool = True, *, positions: Tensor | None = None
    ) -> Tensor:
        """Score every next token.

        Args:
            tokens: `(B, S)`, int64, each in [0, num_tokens).
            is_causal: Whether a position sees no later one, as a language model must.
            positions: `(S,)`, int64, absolute positions of the tokens for xPos or RoPE; None
                means 0 … S − 1. The attention pattern always follows the order in `tokens`.

        Returns:
            `(B, S, num_tokens)` logits; row s scores the token after position s.

        Raises:
            TypeError: If `tokens` or `positions` is not an int64 tensor.
            ValueError: If a shape is wrong, or xPos would leave the range of the dtype.
        """
        _check_integers("tokens", tokens, "(B, S)", ndim=2)
        rotation = self._rotation(tokens, positions)
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        x = self.dropout(x)
        recompute = (
            self.config.activation_checkpointing and self.training and torch.is_grad_enabled()
        )
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, rotation, is_causal, use_reentrant=False)
            else:
                x = block(x, rotation, is_causal)
        return self.output(self.final_norm(x))

    def _rotation(self, tokens: Tensor, positions: Tensor | None) -> Rotation | None:
        """Rotation factors shared by all blocks, or None without positions."""
        config = self.config
        seq_len = tokens.shape[1]
        if positions is not None:
            _check_integers("positions", positions, "(S,)", ndim=1)
            if positions.shape[0] != seq_len:
                raise ValueError(
                    f"positions must name one position per token, got {positions.shape[0]} for "
                    f"{seq_len} tokens."
                )
            if config.positions == "none":
                raise ValueError(
                    'positions were given to a model with positions="none"; drop them.'
                )
        if config.positions == "none":
            return None
        weight = self.embedding.weight
        scale_base = config.xpos_scale_base if config.positions == "xpos" else None
        # A fixed center for explicit positions, because every shard of a sequence must agree on it.
        center = seq_len // 2 if positions is None else 0
        if scale_base is not None:
            reach = center if positions is None else int(positions.abs().max()) if seq_len else 0
            kind = tokens.device.type
            autocast = torch.is_autocast_enabled(kind)
            compute_dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
            check_decay_range(reach, scale_base, compute_dtype)
        if positions is None:
            positions = torch.arange(seq_len, device=tokens.device)
        factor_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return rotation_at(
            positions, config.head_dim, scale_base=scale_base, center=center, dtype=factor_dtype
        )


def _check_integers(name: str, value: object, shape: str, *, ndim: int) -> None:
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 tensor of shape {shape}, got {got}.")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}.")
