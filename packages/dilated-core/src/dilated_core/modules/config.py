"""Options of the modules as immutable objects, for code that builds modules from files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dilated_core.checks import check_head_groups, check_integer, check_number
from dilated_core.inputs import check_dropout, check_max_workspace_bytes, check_scale
from dilated_core.pattern.branches import DilatedPattern, HeadOffsets, Padding

DEFAULT_SEGMENT_LENGTHS = (2048, 4096, 8192)
DEFAULT_DILATION_RATES = (1, 2, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class DilatedAttentionConfig:
    """What `DilatedAttention` is built from.

    Attributes:
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
        head_offsets: `"interleaved"` or `"blocked"`, see `DilatedPattern`.
        padding: `"masked"` or `"attended"`, see `DilatedPattern`.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training.
        max_workspace_bytes: Limit of what forward allocates, see `dilated_attention`.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError, ValueError: As `DilatedPattern` does.
    """

    segment_lengths: Sequence[int] = DEFAULT_SEGMENT_LENGTHS
    dilation_rates: Sequence[int] = DEFAULT_DILATION_RATES
    head_offsets: HeadOffsets = "interleaved"
    padding: Padding = "masked"
    scale: float | None = None
    dropout: float = 0.0
    max_workspace_bytes: int | None = None
    backend: str = "auto"

    def __post_init__(self) -> None:
        pattern = self.pattern
        check_scale(self.scale, head_dim=1)
        check_dropout(self.dropout, name="dropout")
        check_max_workspace_bytes(self.max_workspace_bytes)
        object.__setattr__(self, "segment_lengths", pattern.segment_lengths)
        object.__setattr__(self, "dilation_rates", pattern.dilation_rates)

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern these options describe."""
        return DilatedPattern(
            self.segment_lengths,
            self.dilation_rates,
            head_offsets=self.head_offsets,
            padding=self.padding,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
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
        TypeError: If a count is not an integer.
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
        check_integer("embed_dim", self.embed_dim, at_least=1)
        check_head_groups(self.num_heads, self.num_kv_heads)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim is {self.embed_dim} and num_heads {self.num_heads}; num_heads must "
                f"divide embed_dim, so that all heads have the same head_dim."
            )
        for name, gain in (
            ("layer_norm_eps", self.layer_norm_eps),
            ("gamma_init", self.gamma_init),
        ):
            check_number(name, gain, above=0)
