"""What a LongNet is, as data: frozen, checked, and equal after JSON there and back.

Each option of a model is declared here and nowhere else; the layers take the config.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

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
from torch import nn

from dilated_models.attention_kinds import (
    OVER_RANKS,
    WITH_BRANCHES,
    AttentionKind,
    built_attention,
    check_no_branches,
    checked_options,
)

Activation = Literal["relu", "gelu"]
RotationKind = Literal["xpos", "rotary", "none"]
PositionKind = Literal["xpos", "rotary", "alibi", "none"]

# The sizes of the paper (arXiv 2307.02486, section 4.4), which all have 4 · d_model in between.
PAPER_SIZES: dict[str, dict[str, Any]] = {
    name: {
        "d_model": d_model,
        "nhead": nhead,
        "num_decoder_layers": layers,
        "dim_feedforward": 4 * d_model,
        "activation": "gelu",
    }
    for name, layers, d_model, nhead in (
        ("base", 12, 768, 12),
        ("medium", 24, 1024, 16),
        ("large", 24, 1536, 16),
        ("xl", 32, 2560, 32),
    )
}

# What `check_names` answers to arguments that users give to a config or model.
ELSEWHERE = {
    "is_causal": "is passed to forward",
    "scale": "is 1/√head_dim, so leave it out",
    "drop_path": "is called drop_path_rate",
    "layer_norm": "stands in every block, so leave it out",
    "bias": "is part of every projection, so leave it out",
    "gamma_init": "follows from the numbers of layers, so leave it out",
}


def magneto_gain(num_layers: int) -> float:
    """√(log 2L), the gain of a stack of L blocks (arXiv 2210.06423, table 2)."""
    return math.sqrt(math.log(2 * num_layers))


@answers_names(ELSEWHERE)
@dataclass(frozen=True, kw_only=True, slots=True)
class LongNetConfig:
    """Configuration of a `LongNetLM`; the defaults are the paper's base model.

    Args:
        num_tokens: Vocabulary size; 256 for bytes.
        d_model: Width of the model.
        nhead: Query heads; divides `d_model`.
        num_kv_heads: Heads of keys and values, which divide `nhead`; `nhead` if None.
        num_encoder_layers: Blocks of an encoder that the decoder attends to; 0 for none.
        num_decoder_layers: Blocks of the decoder.
        dim_feedforward: Width of the feed-forward halves.
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        attention_kind: `"dilated"`, or `"ring"`: the same, over the ranks that the model is built
            with, each of which holds a shard of every sequence; from dilated-ring. Or from
            dilated-sparse `"block_sparse"`, blocks by a fixed pattern; `"block_sparse_adaptive"`,
            blocks by a content that training learns to judge; `"moba"` or `"nsa"`, blocks that each
            query chooses. The last two are causal only.
        attention_options: Options of these kinds by name: `layout`, `exchange` and `timeout_s` of
            `ContextParallel` for `"ring"`; those of `dilated_sparse.BlockSparseAttentionConfig`,
            `AdaptiveSparseConfig`, `MoBAConfig` and `NSAConfig` for the others, which have no
            dilated branches, so that the branches and their options must have their defaults.
        dropout: Probability, in [0, 1): of the embedding, of what each half of a block adds, and
            inside the feed-forward. Attention probabilities are never dropped.
        drop_path_rate: Probability, in [0, 1), that training skips a half of the last block for a
            sequence (stochastic depth, arXiv 1603.09382); it grows linearly from 0 in the first.
        activation: `"relu"` or `"gelu"`.
        layer_norm_eps: Of every LayerNorm.
        head_offsets: `"interleaved"` (the paper) or `"blocked"` (published weights).
        padding: `"masked"`, or `"attended"` (published weights).
        positions: `"xpos"`, `"rotary"` (no decay), `"alibi"` (a bias that grows with the distance,
            arXiv 2108.12409; for causal calls and dilated attention without a window), or `"none"`.
        xpos_scale_base: Distance over which xPos decays by one factor, in tokens.
        key_conv: Width, in tokens, of a depthwise causal convolution that is added to the input of
            each attention; 0 for none. It is no part of LongNet: see `CausalConvolution`.
        local_window: W: a token also sees its last W tokens, in the softmax of the branches, so
            that it is not blind behind a border of segments; 0 for none. It is no part of LongNet,
            and needs dilated-sparse: see `dilated_sparse.windowed_dilated_attention`. Shards of
            sequences refuse such a model.
        tie_embeddings: Whether the output layer shares the embedding's weight.
        scale_embedding: Whether embeddings are multiplied by √d_model.
        final_layer_norm: Whether a LayerNorm precedes the output layer.
        activation_checkpointing: Whether training recomputes each block in the backward pass
            instead of keeping its activations.
        backend: As in `dilated_core.dilated_attention`.

    Raises:
        TypeError: If a value has the wrong type, or a name is unknown.
        ValueError: If a value is out of range or two values contradict each other.

    Example:
        >>> config = LongNetConfig(
        ...     num_tokens=256, d_model=64, nhead=4, segment_lengths=[16, 32], dilation_rates=[1, 2]
        ... )
        >>> LongNetConfig.from_json(config.to_json()) == config
        True
    """

    _LEAST: ClassVar[dict[str, int]] = {
        "num_tokens": 1,
        "d_model": 1,
        "nhead": 1,
        "num_encoder_layers": 0,
        "num_decoder_layers": 1,
        "dim_feedforward": 1,
        "key_conv": 0,
        "local_window": 0,
    }

    num_tokens: int
    d_model: int = 768
    nhead: int = 12
    num_kv_heads: int | None = None
    num_encoder_layers: int = 0
    num_decoder_layers: int = 12
    dim_feedforward: int = 3072
    segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768)
    dilation_rates: Sequence[int] = (1, 2, 4, 6, 12)
    attention_kind: AttentionKind = "dilated"
    attention_options: Mapping[str, Any] | Sequence[tuple[str, Any]] = ()
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    activation: Activation = "relu"
    layer_norm_eps: float = 1e-5
    head_offsets: HeadOffsets = "interleaved"
    padding: Padding = "masked"
    positions: PositionKind = "xpos"
    xpos_scale_base: float = 512.0
    key_conv: int = 0
    local_window: int = 0
    tie_embeddings: bool = False
    scale_embedding: bool = True
    final_layer_norm: bool = True
    activation_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, least in self._LEAST.items():
            self._set(name, check_integer(name, getattr(self, name), at_least=least))
        if self.d_model % self.nhead:
            raise ValueError(
                f"nhead is {self.nhead} and d_model {self.d_model}; nhead must divide d_model, so "
                f"that all heads have the same head_dim."
            )
        if self.num_kv_heads is not None:
            self._set("num_kv_heads", check_head_groups(self.nhead, self.num_kv_heads))
        check_choice("activation", self.activation, get_args(Activation))
        check_choice("positions", self.positions, get_args(PositionKind))
        if self.positions in ("xpos", "rotary") and self.head_dim % 2:
            raise ValueError(
                f"head_dim, d_model / nhead, is {self.head_dim}; it must be even, since positions="
                f"{self.positions!r} turns pairs of channels, so change nhead or use "
                f'positions="none".'
            )
        for name in ("layer_norm_eps", "xpos_scale_base"):
            self._set(name, check_number(name, getattr(self, name), above=0))
        for name in ("dropout", "drop_path_rate"):
            self._set(name, check_number(name, getattr(self, name), at_least=0, below=1))
        for name in (
            "tie_embeddings",
            "scale_embedding",
            "final_layer_norm",
            "activation_checkpointing",
        ):
            check_bool(name, getattr(self, name))
        self._check_attention_kind()
        if self.positions == "alibi" and (not self.has_branches or self.local_window):
            raise ValueError(
                f"positions is 'alibi', attention_kind {self.attention_kind!r} and local_window "
                f"{self.local_window}; ALiBi needs dilated attention without a window, so use "
                f'positions="rotary".'
            )
        attention = self.attention  # checks lengths, rates, head_offsets, padding and backend
        self._set("segment_lengths", attention.segment_lengths)
        self._set("dilation_rates", attention.dilation_rates)

    def _check_attention_kind(self) -> None:
        """Check the kind and its options; keep the options as pairs, so that configs have a hash.

        Raises:
            ImportError: If the kind needs a package that is not installed.
            TypeError: If an option is unknown.
            ValueError: If the kind is unknown or not installed, or a value has no effect.
        """
        kind = self.attention_kind
        self._set("attention_options", checked_options(kind, self.attention_options))
        if kind == "ring" and self.local_window:
            raise ValueError(
                f"local_window is {self.local_window} and attention_kind 'ring'; attention over "
                f"ranks has no window, so leave local_window out."
            )
        if self.has_branches:
            return
        check_no_branches(self, kind)
        # Values are checked by a module that is as small as it may be, and leaves no trace.
        with torch.random.fork_rng(devices=[]):
            self._built(num_heads=1, head_dim=2, device="cpu")

    def check_over_ranks(self) -> None:
        """Refuse attention that cannot be spread over ranks.

        Raises:
            ValueError: If there is no such attention of this kind.
        """
        if self.attention_kind not in OVER_RANKS:
            raise ValueError(
                f"context_parallel is given and attention_kind is {self.attention_kind!r}; over "
                f"ranks attention must be one of {', '.join(map(repr, OVER_RANKS))}, so leave "
                f"context_parallel out."
            )

    def build_attention(
        self,
        *,
        gamma_init: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The attention of a block, if it has no branches: on q, k and v, or a layer for `"nsa"`.

        Args:
            gamma_init: Gain of the initial weights; that of the config if None.
            device, dtype: Of parameters.

        Raises:
            TypeError, ValueError: As for the options of this kind; if it is not installed.
        """
        return self._built(
            num_heads=self.nhead,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            gamma_init=self.gamma_init if gamma_init is None else gamma_init,
            device=device,
            dtype=dtype,
        )

    def _built(self, **sizes: Any) -> nn.Module:
        return built_attention(
            self.attention_kind,
            dict(self.attention_options),
            backend=self.backend,
            layer_norm_eps=self.layer_norm_eps,
            **sizes,
        )

    def _set(self, name: str, value: object) -> None:
        """Replace a value by its checked form."""
        object.__setattr__(self, name, value)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.nhead

    @property
    def attention(self) -> DilatedAttentionConfig:
        """The dilated attention of every block; of its defaults for another `attention_kind`."""
        return DilatedAttentionConfig(
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offsets=self.head_offsets,
            padding=self.padding,
            # ALiBi adds channels to a head, which must not change the scale.
            scale=self.head_dim**-0.5 if self.positions == "alibi" else None,
            backend=self.backend,
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of every block.

        Raises:
            ValueError: If the attention is of another kind.
        """
        if not self.has_branches:
            raise ValueError(
                f"attention_kind is {self.attention_kind!r}; only 'dilated' and 'ring' attention "
                f"have a pattern of branches."
            )
        return self.attention.pattern

    @property
    def has_branches(self) -> bool:
        """Whether attention is by dilated branches, on one device or over ranks."""
        return self.attention_kind in WITH_BRANCHES

    @property
    def kv_dim(self) -> int:
        """Width of all heads of keys, and of all heads of values."""
        return self.head_dim * (self.num_kv_heads or self.nhead)

    @property
    def activation_dropout(self) -> float:
        """Dropout behind the activation of a feed-forward: `dropout`."""
        return self.dropout

    @property
    def gamma_init(self) -> float:
        """MAGNETO's γ of M decoder blocks: √(log 2M), √(log 3M) if they attend to an encoder."""
        if self.num_encoder_layers:
            return math.sqrt(math.log(3 * self.num_decoder_layers))
        return magneto_gain(self.num_decoder_layers)

    @property
    def encoder_gamma_init(self) -> float:
        """MAGNETO's γ of N encoder blocks below M decoder blocks: √(⅓ log 3M · log 2N)."""
        return self.gamma_init * magneto_gain(self.num_encoder_layers) / math.sqrt(3)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["attention_options"] = dict(self.attention_options)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]

    @classmethod
    def from_preset(cls, name: str, **fields: Any) -> Self:
        """A model of the paper's size, with its branches.

        Args:
            name: `"base"` (12 layers, width 768, 12 heads), `"medium"` (24, 1024, 16), `"large"`
                (24, 1536, 16) or `"xl"` (32, 2560, 32); the paper calls them its models of 125 M,
                350 M, 760 M and 2.7 B parameters.
            **fields: `num_tokens`, and fields that replace the preset's.

        Raises:
            TypeError: If `num_tokens` is missing, or a field is unknown or has the wrong type.
            ValueError: If there is no such preset, or a field is out of range.

        Example:
            >>> config = LongNetConfig.from_preset("medium", num_tokens=64000)
            >>> config.num_decoder_layers, config.d_model, config.nhead
            (24, 1024, 16)
        """
        check_choice("name", name, tuple(PAPER_SIZES))
        return cls.from_dict(PAPER_SIZES[name] | fields)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; refuses unknown names."""
        if cls._LEAST["num_tokens"] and "num_tokens" not in fields:
            raise TypeError("num_tokens is missing; it must be given, as the vocabulary size.")
        return cls(**fields)

    def to_json(self) -> str:
        """The fields as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str | Path) -> Self:
        """Inverse of `to_json`.

        Args:
            text: The JSON text, or the path of a file that holds it.
        """
        loaded: object = json.loads(text.read_text("utf-8") if isinstance(text, Path) else text)
        if not isinstance(loaded, dict):
            raise TypeError(
                f"the configuration is a JSON {type(loaded).__name__}; it must be an object, as "
                f"to_json writes it."
            )
        return cls.from_dict(loaded)  # pyright: ignore[reportUnknownArgumentType]
