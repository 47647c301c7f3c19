"""Options of the modules as immutable objects. Each option is declared here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from dilated_core.checks import (
    answers_names,
    check_bool,
    check_float_dtype,
    check_head_groups,
    check_head_range,
    check_integer,
    check_number,
    set_checked,
)
from dilated_core.inputs import (
    check_backend_name,
    check_dropout,
    check_max_workspace_bytes,
    check_scale,
)
from dilated_core.pattern.branches import DilatedPattern, HeadOffsets, Padding
from dilated_core.pattern.ladder import select_segments

DEFAULT_SEGMENT_LENGTHS = (2048, 4096, 8192)
DEFAULT_DILATION_RATES = (1, 2, 4)

# What `check_names` answers to arguments that users give to constructors and that belong elsewhere.
FORWARD_ARGUMENTS: dict[str, str] = dict.fromkeys(
    ("is_causal", "key_padding_mask", "cu_seqlens"), "is passed to forward"
)
DYNAMIC_ARGUMENTS = {
    "is_causal": "is passed to forward",
    "key_padding_mask": "is passed to forward",
    "segment_lengths": "follows the length of each call, so set first_segment_length and growth",
    "dilation_rates": "follows the length of each call, so set growth",
}

MULTIHEAD_ARGUMENTS = FORWARD_ARGUMENTS | {
    "attn_mask": "is passed to forward",
    "need_weights": "is passed to forward",
    "batch_first": "is always true, since inputs are (B, S, E), so leave it out",
    "kdim": "is always embed_dim, so leave it out",
    "vdim": "is always embed_dim, so leave it out",
    "add_bias_kv": "has no counterpart, so leave it out",
    "add_zero_attn": "has no counterpart, so leave it out",
}


@dataclass(frozen=True, kw_only=True)
class _SharedOptions:
    """Options of attention but for its branches; `DilatedAttentionConfig` explains them."""

    head_offsets: HeadOffsets = "interleaved"
    padding: Padding = "masked"
    scale: float | None = None
    dropout: float = 0.0
    head_range: tuple[int, int] | None = None
    max_workspace_bytes: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.pattern_of((1,), (1,))
        check_scale(self.scale, head_dim=1)
        check_max_workspace_bytes(self.max_workspace_bytes)
        set_checked(self, dropout=check_dropout(self.dropout, name="dropout"))
        if self.head_range is not None:
            # Each call checks it again with its number of heads, which is at least one.
            set_checked(self, head_range=check_head_range(self.head_range, num_heads=1))
        check_backend_name(self.backend)

    def pattern_of(
        self, segment_lengths: Sequence[int], dilation_rates: Sequence[int]
    ) -> DilatedPattern:
        """The pattern with these branches and the options given."""
        return DilatedPattern(
            segment_lengths,
            dilation_rates,
            head_offsets=self.head_offsets,
            padding=self.padding,
        )

    def call_options(self, *, is_training: bool) -> dict[str, Any]:
        """Keyword arguments of `dilated_attention`, beside the pattern."""
        return {
            "scale": self.scale,
            "dropout_p": self.dropout if is_training else 0.0,
            "head_range": self.head_range,
            "max_workspace_bytes": self.max_workspace_bytes,
            "backend": self.backend,
        }


@answers_names(FORWARD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class DilatedAttentionConfig(_SharedOptions):
    """What `DilatedAttention` is built from.

    Attributes:
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
        head_offsets: `"interleaved"` or `"blocked"`, see `DilatedPattern`.
        padding: `"masked"` or `"attended"`, see `DilatedPattern`.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        head_range: `(first, total)` if q, k and v hold the heads from `first` on of `total`, as
            when heads are spread over devices, see `dilated_attention`; None if they hold all.
        max_workspace_bytes: Limit of what forward allocates, see `dilated_attention`.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a value is out of range, as for `DilatedPattern`.

    Example:
        >>> DilatedAttentionConfig(segment_lengths=[8, 32], dilation_rates=[1, 4]).pattern.branches
        (Branch(segment_length=8, dilation_rate=1), Branch(segment_length=32, dilation_rate=4))
    """

    segment_lengths: Sequence[int] = DEFAULT_SEGMENT_LENGTHS
    dilation_rates: Sequence[int] = DEFAULT_DILATION_RATES

    def __post_init__(self) -> None:
        _SharedOptions.__post_init__(self)
        pattern = self.pattern
        set_checked(
            self, segment_lengths=pattern.segment_lengths, dilation_rates=pattern.dilation_rates
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern these options describe."""
        return self.pattern_of(self.segment_lengths, self.dilation_rates)


@answers_names(DYNAMIC_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class DynamicDilatedAttentionConfig(_SharedOptions):
    """What `DynamicDilatedAttention` is built from.

    The other options are those of `DilatedAttentionConfig`.

    Attributes:
        first_segment_length: w₀, in positions, as in `select_segments`.
        growth: Ratio of neighbouring branches' lengths and rates, as there.
        keep_every_position: Whether rates stop at the number of heads, as there.
        memory_budget: Bytes of the keys and values that one query may see, as there.

    Raises:
        TypeError, ValueError: As for `select_segments` and `DilatedAttentionConfig`.
    """

    first_segment_length: int = 2048
    growth: int = 2
    keep_every_position: bool = False
    memory_budget: int | None = None

    def __post_init__(self) -> None:
        _SharedOptions.__post_init__(self)
        if self.memory_budget is not None:
            set_checked(
                self, memory_budget=check_integer("memory_budget", self.memory_budget, at_least=1)
            )
        select_segments(
            1,
            1,
            first_segment_length=self.first_segment_length,
            growth=self.growth,
            keep_every_position=self.keep_every_position,
        )


@answers_names(MULTIHEAD_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class MultiheadConfig:
    """What `MultiheadDilatedAttention` has around the attention itself.

    Attributes:
        embed_dim: E, the width of its inputs and outputs; a multiple of `num_heads`.
        num_heads: H.
        num_kv_heads: Heads of keys and values, which divide `num_heads`; `num_heads` if None.
        bias: Whether the projections add a bias.
        layer_norm: Whether a LayerNorm stands between the attention and the output projection.
        layer_norm_eps: Its epsilon.
        gamma_init: Gain of the initial v and output projections (MAGNETO's γ).
        device: Where the parameters are.
        dtype: Their dtype.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a number is out of range or `num_heads` does not divide `embed_dim`.
    """

    embed_dim: int = 768
    num_heads: int = 12
    num_kv_heads: int | None = None
    bias: bool = True
    layer_norm: bool = True
    layer_norm_eps: float = 1e-5
    gamma_init: float = 1.0
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        embed_dim = check_integer("embed_dim", self.embed_dim, at_least=1)
        num_heads = check_integer("num_heads", self.num_heads, at_least=1)
        if self.num_kv_heads is not None:
            set_checked(self, num_kv_heads=check_head_groups(num_heads, self.num_kv_heads))
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim is {embed_dim} and num_heads {num_heads}; num_heads must divide "
                f"embed_dim, so that all heads have the same head_dim."
            )
        check_bool("bias", self.bias)
        check_bool("layer_norm", self.layer_norm)
        set_checked(
            self,
            embed_dim=embed_dim,
            num_heads=num_heads,
            layer_norm_eps=check_number("layer_norm_eps", self.layer_norm_eps, above=0),
            gamma_init=check_number("gamma_init", self.gamma_init, above=0),
        )
        if self.dtype is not None:
            check_float_dtype(self.dtype)


@dataclass(frozen=True)
class DilatedAttentionArguments(DilatedAttentionConfig):
    """The signature of `DilatedAttention`: the branches come first and are required."""

    segment_lengths: Sequence[int] = field()
    dilation_rates: Sequence[int] = field()


@dataclass(frozen=True)
class MultiheadArguments(DilatedAttentionConfig, MultiheadConfig):
    """The signature of `MultiheadDilatedAttention`: both configs, with four required options."""

    embed_dim: int = field()
    num_heads: int = field()
    _: KW_ONLY
    segment_lengths: Sequence[int] = field()
    dilation_rates: Sequence[int] = field()
