"""What a slide encoder is, as data, and the published architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from dilated_core import DilatedPattern
from dilated_core.checks import (
    answers_names,
    check_bool,
    check_integer,
    check_names,
    check_number,
)

from dilated_models.encoder.config import EncoderConfig

DEFAULT_TILE_SIZE = 256
DEFAULT_MAX_WSI_SIZE = 262_144
_FIRST_SEGMENT = 1024


def segment_lengths_for(max_wsi_size: int, tile_size: int) -> tuple[int, ...]:
    """Segment lengths that GigaPath derives from the largest slide, in tiles.

    Five lengths from 1024 to the largest power of two that the tiles of a square slide fill, at
    equal ratios and rounded down.

    Args:
        max_wsi_size: Longer side of the largest slide, in pixels.
        tile_size: Side of a tile, in pixels.

    Example:
        >>> segment_lengths_for(262_144, 256)  # the default of the published code
        (1024, 5792, 32768, 185363, 1048576)
        >>> segment_lengths_for(250_000, 256)  # what the published fine-tuning passes
        (1024, 4870, 23170, 110217, 524288)
    """
    tiles = (max_wsi_size // tile_size) ** 2
    if tiles < 1:
        raise ValueError(
            f"max_wsi_size is {max_wsi_size} and tile_size {tile_size}; a slide must hold a tile, "
            f"so give a max_wsi_size of at least {tile_size}."
        )
    first, last = math.log2(_FIRST_SEGMENT), tiles.bit_length() - 1
    return tuple(int(2 ** (first + i * (last - first) / 4)) for i in range(5))


# What `check_names` answers to arguments that users give to a slide encoder.
ELSEWHERE = {
    "all_layers": "is passed to forward",
    "head_offsets": 'is "blocked", as in the published code, so leave it out',
    "padding": 'is "attended", as in the published code, so leave it out',
    "mlp_ratio": "is ffn_dim / embed_dim, so give ffn_dim",
    "norm_layer": "is a LayerNorm, so give norm_eps",
}


@answers_names(ELSEWHERE)
@dataclass(frozen=True, kw_only=True)
class SlideEncoderConfig:
    """What a `LongNetSlideEncoder` is built from; the defaults are Prov-GigaPath's.

    Attributes:
        in_chans: Width of tile embeddings.
        embed_dim: E, width of the encoder and of its slide embeddings.
        depth: Number of layers.
        num_heads: Number of heads; divides `embed_dim`.
        ffn_dim: Width of the feed-forwards; 4 · `embed_dim` if None.
        tile_size: Side of a grid cell, in the pixels that coordinates count.
        slide_ngrids: Cells per side of the grid.
        max_wsi_size: Longer side of the largest slide, in pixels, from which the pattern follows as
            in `segment_lengths_for`; 262144 if None and there are no `segment_lengths`.
        segment_lengths: w of each branch, in tiles; from `max_wsi_size` and `tile_size` if None.
        dilation_rates: r of each branch.
        global_pool: Whether the slide embedding is the mean over tiles instead of the class token.
        dropout: As for a `LongNetEncoder`.
        drop_path_rate: As for a `LongNetEncoder`.
        norm_eps: Of the LayerNorm of slide embeddings.
        layer_norm_eps: Of every other LayerNorm.
        activation_checkpointing: As for a `LongNetEncoder`.
        backend: As in `dilated_core.dilated_attention`.

    Raises:
        TypeError: If a value has the wrong type, or a name is unknown.
        ValueError: If a value is out of range or two values contradict each other.

    Example:
        >>> SlideEncoderConfig().pattern.segment_lengths
        (1024, 5792, 32768, 185363, 1048576)
    """

    in_chans: int = 1536
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 16
    ffn_dim: int | None = None
    tile_size: int = DEFAULT_TILE_SIZE
    slide_ngrids: int = 1000
    max_wsi_size: int | None = None
    segment_lengths: Sequence[int] | None = None
    dilation_rates: Sequence[int] = (1, 2, 4, 8, 16)
    global_pool: bool = False
    dropout: float = 0.25
    drop_path_rate: float = 0.1
    norm_eps: float = 1e-6
    layer_norm_eps: float = 1e-5
    activation_checkpointing: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name in ("in_chans", "embed_dim", "depth", "num_heads", "tile_size", "slide_ngrids"):
            self._set(name, check_integer(name, getattr(self, name), at_least=1))
        if self.embed_dim % 4:
            raise ValueError(
                f"embed_dim is {self.embed_dim}; it must be a multiple of 4, since positions are "
                f"sines and cosines of two axes."
            )
        ffn_dim = 4 * self.embed_dim if self.ffn_dim is None else self.ffn_dim
        self._set("ffn_dim", check_integer("ffn_dim", ffn_dim, at_least=1))
        check_bool("global_pool", self.global_pool)
        self._set("norm_eps", check_number("norm_eps", self.norm_eps, above=0))
        if self.max_wsi_size is not None:
            self._set("max_wsi_size", check_integer("max_wsi_size", self.max_wsi_size, at_least=1))
        if self.segment_lengths is None:
            size = DEFAULT_MAX_WSI_SIZE if self.max_wsi_size is None else self.max_wsi_size
            self._set("max_wsi_size", size)
            self._set("segment_lengths", segment_lengths_for(size, self.tile_size))
        encoder = self.encoder  # checks what remains
        self._set("segment_lengths", encoder.segment_lengths)
        self._set("dilation_rates", encoder.dilation_rates)
        if self.max_wsi_size is not None:
            derived = segment_lengths_for(self.max_wsi_size, self.tile_size)
            if derived != self.segment_lengths:
                raise ValueError(
                    f"segment_lengths is {list(encoder.segment_lengths)}, and max_wsi_size "
                    f"{self.max_wsi_size} with tile_size {self.tile_size} gives {list(derived)}; "
                    f"they must agree, so give one of the two."
                )

    def _set(self, name: str, value: object) -> None:
        """Replace a value by its checked form."""
        object.__setattr__(self, name, value)

    @property
    def encoder(self) -> EncoderConfig:
        """The options of the layers."""
        assert self.ffn_dim is not None
        assert self.segment_lengths is not None
        return EncoderConfig(
            d_model=self.embed_dim,
            nhead=self.num_heads,
            num_layers=self.depth,
            dim_feedforward=self.ffn_dim,
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            dropout=self.dropout,
            drop_path_rate=self.drop_path_rate,
            layer_norm_eps=self.layer_norm_eps,
            activation_checkpointing=self.activation_checkpointing,
            head_offsets="blocked",
            padding="attended",
            backend=self.backend,
        )

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of every layer."""
        return self.encoder.pattern


ARCHITECTURES: Mapping[str, SlideEncoderConfig] = {
    "gigapath_slide_enc12l768d": SlideEncoderConfig(),
    "gigapath_slide_enc12l384d": SlideEncoderConfig(embed_dim=384, in_chans=384),
    "gigapath_slide_enc24l1024d": SlideEncoderConfig(embed_dim=1024, depth=24),
    "gigapath_slide_enc12l1536d": SlideEncoderConfig(embed_dim=1536),
}
"""Prov-GigaPath, GigaPath-Flash, and two architectures without published weights; 16 heads each."""


def config_of(architecture: str, **options: Any) -> SlideEncoderConfig:
    """The config of a published architecture, with some options replaced.

    The pattern follows `max_wsi_size` and `tile_size` unless `segment_lengths` is given.

    Raises:
        TypeError: If an option is unknown.
        ValueError: If the architecture is unknown, or an option is out of range.

    Example:
        >>> config_of("gigapath_slide_enc12l384d").encoder.d_model
        384
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"the architecture is {architecture!r}; it must be one of "
            f"{', '.join(map(repr, ARCHITECTURES))}."
        )
    return with_options(ARCHITECTURES[architecture], **options)


def with_options(config: SlideEncoderConfig, **options: Any) -> SlideEncoderConfig:
    """A config with some options replaced; the pattern follows them."""
    check_names("SlideEncoderConfig", options, [field.name for field in fields(config)], ELSEWHERE)
    follows = {"segment_lengths", "max_wsi_size", "tile_size"} & options.keys()
    if "segment_lengths" in follows and "max_wsi_size" not in follows:
        options = {"max_wsi_size": None, **options}
    elif "max_wsi_size" in follows or (follows and config.max_wsi_size is not None):
        options = {"segment_lengths": None, **options}
    if "embed_dim" in options:
        options = {"ffn_dim": None, **options}
    return replace(config, **options)
