"""What a LongNet is, as data: frozen, checked, and the same after a trip through JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dilated_core import DilatedPattern

from dilated_models.layers.feed_forward import ACTIVATIONS, Activation

PositionKind = Literal["xpos", "rotary", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LongNetConfig:
    """Configuration of a `LongNetLM`; the defaults are the paper's base model.

    Args:
        num_tokens: Vocabulary size; 256 for bytes.
        d_model: Width of the model.
        nhead: Query heads; divides `d_model`.
        num_encoder_layers: 0. The model is decoder-only.
        num_decoder_layers: Number of blocks.
        dim_feedforward: Width of the feed-forward halves.
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        dropout: Probability, in [0, 1): of the embedding, of what each half of a block adds, and
            inside the feed-forward. Attention probabilities are never dropped.
        activation: `"relu"` or `"gelu"`.
        layer_norm_eps: Of every LayerNorm.
        head_offsets: `"interleaved"` (the paper) or `"blocked"` (published weights).
        padding: `"masked"`, or `"attended"` (published weights).
        positions: `"xpos"`, `"rotary"` (no decay), or `"none"`.
        xpos_scale_base: Distance over which xPos decays by one factor, in tokens.
        tie_embeddings: Whether the output layer shares the embedding's weight.
        scale_embedding: Whether embeddings are multiplied by √d_model.
        final_layer_norm: Whether a LayerNorm precedes the output layer.
        activation_checkpointing: Whether training recomputes each block in the backward pass
            instead of keeping its activations.
        backend: As in `dilated_core.dilated_attention`.

    Raises:
        TypeError: If a value has the wrong type, or `from_dict` finds an unknown name.
        ValueError: If a value is out of range or two values contradict each other.

    Example:
        >>> config = LongNetConfig(
        ...     num_tokens=256, d_model=64, nhead=4, segment_lengths=[16, 32], dilation_rates=[1, 2]
        ... )
        >>> LongNetConfig.from_json(config.to_json()) == config
        True
    """

    num_tokens: int
    d_model: int = 768
    nhead: int = 12
    num_encoder_layers: int = 0
    num_decoder_layers: int = 12
    dim_feedforward: int = 3072
    segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: Sequence[int] = (1, 2, 4, 6, 12)
    dropout: float = 0.0
    activation: Activation = "relu"
    layer_norm_eps: float = 1e-5
    head_offsets: Literal["interleaved", "blocked"] = "interleaved"
    padding: Literal["masked", "attended"] = "masked"
    positions: PositionKind = "xpos"
    xpos_scale_base: float = 512.0
    tie_embeddings: bool = False
    scale_embedding: bool = True
    final_layer_norm: bool = True
    activation_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_tokens", "d_model", "nhead", "num_decoder_layers", "dim_feedforward"):
            _check_count(name, getattr(self, name), at_least=1)
        _check_count("num_encoder_layers", self.num_encoder_layers, at_least=0)
        if self.num_encoder_layers:
            raise ValueError(
                f"num_encoder_layers={self.num_encoder_layers} is not supported: LongNetLM is "
                f"decoder-only, so leave num_encoder_layers at 0 and give all layers to "
                f"num_decoder_layers."
            )
        if self.d_model % self.nhead:
            raise ValueError(
                f"nhead must divide d_model, got d_model={self.d_model} and nhead={self.nhead}."
            )
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("positions", self.positions, get_args(PositionKind))
        if self.positions != "none" and self.head_dim % 2:
            raise ValueError(
                f"positions={self.positions!r} turns pairs of channels, so d_model / nhead must be "
                f'even, got {self.head_dim}; change nhead or use positions="none".'
            )
        _check_number("dropout", self.dropout)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}.")
        for name in ("layer_norm_eps", "xpos_scale_base"):
            _check_number(name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")
        for name in (
            "tie_embeddings",
            "scale_embedding",
            "final_layer_norm",
            "activation_checkpointing",
        ):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if not isinstance(self.backend, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"backend must be a name such as 'auto', got {self.backend!r}.")
        pattern = self.pattern  # checks lengths, rates, head_offsets and padding
        object.__setattr__(self, "segment_lengths", tuple(pattern.segment_lengths))
        object.__setattr__(self, "dilation_rates", tuple(pattern.dilation_rates))

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.nhead

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of every block."""
        return DilatedPattern(
            self.segment_lengths,
            self.dilation_rates,
            head_offsets=self.head_offsets,
            padding=self.padding,
        )

    @property
    def gamma_init(self) -> float:
        """MAGNETO's gain for a stack of L blocks: √(log 2L) (arXiv 2210.06423, table 2)."""
        return math.sqrt(math.log(2 * self.num_decoder_layers))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> LongNetConfig:
        """Inverse of `to_dict`; refuses unknown names."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise TypeError(
                f"unknown configuration name {', '.join(map(repr, unknown))}; known names are "
                f"{', '.join(sorted(known))}."
            )
        if "num_tokens" not in fields:
            raise TypeError("the configuration lacks num_tokens, the vocabulary size.")
        return cls(**fields)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str | Path) -> LongNetConfig:
        """Inverse of `to_json`.

        Args:
            text: The JSON text, or the path of a file that holds it.
        """
        loaded: object = json.loads(text.read_text("utf-8") if isinstance(text, Path) else text)
        if not isinstance(loaded, dict):
            raise TypeError(f"a configuration is a JSON object, got {type(loaded).__name__}.")
        return cls.from_dict(loaded)  # pyright: ignore[reportUnknownArgumentType]


def _check_count(name: str, value: object, *, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {value}.")


def _check_number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        raise TypeError(f"{name} must be a finite number, got {value!r}.")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
