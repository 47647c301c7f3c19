"""Options of an encoder layer and of a stack of them; each is declared here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import get_args

import torch
from dilated_core import DilatedAttentionConfig, DilatedPattern
from dilated_core.checks import (
    answers_names,
    check_bool,
    check_choice,
    check_head_groups,
    check_integer,
    check_number,
)
from dilated_core.pattern.branches import HeadOffsets, Padding

from dilated_models.config import Activation, RotationKind, magneto_gain

# What `check_names` answers to arguments that users give to constructors and that belong elsewhere.
ELSEWHERE = {
    "is_causal": "is passed to forward",
    "key_padding_mask": "is passed to forward, as src_key_padding_mask",
    "cu_seqlens": "is passed to forward",
    "norm_first": "is always true, as in MAGNETO, so leave it out",
    "layer_norm": "stands in every block, so leave it out",
    "bias": "is part of every projection, so leave it out",
    "scale": "is 1/√head_dim, so leave it out",
}
STACK_ELSEWHERE = ELSEWHERE | {
    "batch_first": "is always true, since inputs are (B, S, E), so leave it out",
    "key_padding_mask": "is passed to forward",
    "gamma_init": "follows from num_layers, so leave it out",
    "drop_path": "is called drop_path_rate",
    "on_state": "is passed to forward",
}


@answers_names(ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class EncoderLayerConfig:
    """What a layer of an encoder or a decoder is built from.

    Attributes:
        d_model: Width of its inputs and outputs.
        nhead: Number of heads; divides `d_model`.
        num_kv_heads: Heads of keys and values, which divide `nhead`; `nhead` if None.
        dim_feedforward: Width of the feed-forward.
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
        dropout: Probability of dropping what each half adds to the residual.
        attention_dropout: Probability of dropping an attention probability.
        activation_dropout: Probability of dropping a value behind the activation.
        drop_path: Probability that a half of the layer is skipped for a sequence in training
            (stochastic depth, arXiv 1603.09382).
        activation: `"gelu"` or `"relu"`.
        layer_norm_eps: Of every LayerNorm.
        gamma_init: Gain of the initial weights (MAGNETO's γ).
        head_offsets: `"interleaved"` (the paper) or `"blocked"` (published weights).
        padding: `"masked"`, or `"attended"` (published weights).
        backend: As in `dilated_core.dilated_attention`.
        batch_first: Whether inputs are `(B, S, E)`, or `(S, B, E)` as by default in PyTorch.

    Raises:
        TypeError: If a value has the wrong type, or a name is unknown.
        ValueError: If a value is out of range or two values contradict each other.
    """

    d_model: int
    nhead: int
    num_kv_heads: int | None = None
    dim_feedforward: int = 2048
    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path: float = 0.0
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    head_offsets: HeadOffsets = "interleaved"
    padding: Padding = "masked"
    backend: str = "auto"
    batch_first: bool = True

    def __post_init__(self) -> None:
        check_bool("batch_first", self.batch_first)
        for name in ("d_model", "nhead", "dim_feedforward"):
            self._set(name, check_integer(name, getattr(self, name), at_least=1))
        if self.d_model % self.nhead:
            raise ValueError(
                f"nhead is {self.nhead} and d_model {self.d_model}; nhead must divide d_model, so "
                f"that all heads have the same head_dim."
            )
        check_head_groups(self.nhead, self.num_kv_heads)
        for name in ("dropout", "attention_dropout", "activation_dropout", "drop_path"):
            self._set(name, check_number(name, getattr(self, name), at_least=0, below=1))
        for name in ("layer_norm_eps", "gamma_init"):
            self._set(name, check_number(name, getattr(self, name), above=0))
        check_choice("activation", self.activation, get_args(Activation))
        attention = self.attention  # checks lengths, rates, head_offsets, padding and backend
        self._set("segment_lengths", attention.segment_lengths)
        self._set("dilation_rates", attention.dilation_rates)

    def _set(self, name: str, value: object) -> None:
        """Replace a value by its checked form."""
        object.__setattr__(self, name, value)

    @property
    def attention(self) -> DilatedAttentionConfig:
        """The attention of the layer."""
        return DilatedAttentionConfig(
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offsets=self.head_offsets,
            padding=self.padding,
            dropout=self.attention_dropout,
            backend=self.backend,
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of the layer."""
        return self.attention.pattern


@answers_names(STACK_ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What a `LongNetEncoder` is built from; options of its layers as in `EncoderLayerConfig`.

    Attributes:
        d_model: Width of its inputs and outputs.
        nhead: Number of heads; divides `d_model`.
        num_kv_heads: As for a layer.
        num_layers: L, the number of layers.
        dim_feedforward: Width of the feed-forwards.
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
        dropout: Of the inputs too.
        attention_dropout: As for a layer.
        activation_dropout: As for a layer.
        drop_path_rate: `drop_path` of the last layer; it grows linearly from 0 in the first.
        activation: As for a layer.
        layer_norm_eps: Of every LayerNorm.
        positions: `"none"`, `"rotary"` or `"xpos"`: how queries and keys are turned. xPos' factors
            decay with the distance to earlier keys, and grow to later ones.
        xpos_scale_base: Distance over which xPos decays by one factor, in positions.
        final_layer_norm: Whether a LayerNorm follows the last layer.
        activation_checkpointing: Whether training recomputes each layer in the backward pass
            instead of keeping its activations.
        head_offsets: As for a layer.
        padding: As for a layer.
        backend: As for a layer.

    Raises:
        TypeError: If a value has the wrong type, or a name is unknown.
        ValueError: If a value is out of range or two values contradict each other.
    """

    d_model: int = 768
    nhead: int = 12
    num_kv_heads: int | None = None
    num_layers: int = 12
    dim_feedforward: int = 3072
    segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: Sequence[int] = (1, 2, 4, 6, 12)
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    drop_path_rate: float = 0.0
    activation: Activation = "gelu"
    layer_norm_eps: float = 1e-5
    positions: RotationKind = "none"
    xpos_scale_base: float = 512.0
    final_layer_norm: bool = True
    activation_checkpointing: bool = False
    head_offsets: HeadOffsets = "interleaved"
    padding: Padding = "masked"
    backend: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "num_layers", check_integer("num_layers", self.num_layers, at_least=1)
        )
        rate = check_number("drop_path_rate", self.drop_path_rate, at_least=0, below=1)
        object.__setattr__(self, "drop_path_rate", rate)
        check_choice("positions", self.positions, get_args(RotationKind))
        base = check_number("xpos_scale_base", self.xpos_scale_base, above=0)
        object.__setattr__(self, "xpos_scale_base", base)
        for name in ("final_layer_norm", "activation_checkpointing"):
            check_bool(name, getattr(self, name))
        last = self.layer(self.num_layers - 1)  # checks what a layer has
        if self.positions != "none" and self.head_dim % 2:
            raise ValueError(
                f"head_dim, d_model / nhead, is {self.head_dim}; it must be even, since positions="
                f"{self.positions!r} turns pairs of channels, so change nhead or use "
                f'positions="none".'
            )
        object.__setattr__(self, "segment_lengths", last.segment_lengths)
        object.__setattr__(self, "dilation_rates", last.dilation_rates)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.nhead

    def layer(self, index: int) -> EncoderLayerConfig:
        """The options of layer `index`, counted from 0."""
        return EncoderLayerConfig(
            d_model=self.d_model,
            nhead=self.nhead,
            num_kv_heads=self.num_kv_heads,
            dim_feedforward=self.dim_feedforward,
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            activation_dropout=self.activation_dropout,
            drop_path=self.drop_path_rate * index / max(1, self.num_layers - 1),
            activation=self.activation,
            layer_norm_eps=self.layer_norm_eps,
            gamma_init=magneto_gain(self.num_layers),
            head_offsets=self.head_offsets,
            padding=self.padding,
            backend=self.backend,
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of every layer."""
        return self.layer(0).pattern


@dataclass(frozen=True)
class EncoderLayerArguments(EncoderLayerConfig):
    """The signature of both layers: what is required may be positional."""

    d_model: int = field()
    nhead: int = field()
    segment_lengths: Sequence[int] = field()
    dilation_rates: Sequence[int] = field()
    _: KW_ONLY
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None


@dataclass(frozen=True, kw_only=True)
class EncoderArguments(EncoderConfig):
    """The signature of `LongNetEncoder`: the fields of `EncoderConfig`, device and dtype."""

    device: torch.device | str | None = None
    dtype: torch.dtype | None = None
