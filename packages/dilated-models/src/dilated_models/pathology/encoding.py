"""Many slides, one after another: embed, write, skip what is there, report what fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dilated_models.pathology.coordinates import (
    CoordinateReport,
    Placement,
    place,
    report_coordinates,
)
from dilated_models.pathology.embedding import SlideInput, embed_slide, slide_input, tile_attention
from dilated_models.pathology.features import SlideFeatures, read_features
from dilated_models.pathology.store import EmbeddingStore
from dilated_models.slide.encoder import LongNetSlideEncoder
from dilated_models.slide.recipes import Recipe


@dataclass(frozen=True)
class EncodingOptions:
    """How slides are encoded.

    Attributes:
        recipe: Which embedding.
        order: `"row-major"` or `"as-given"`.
        tile_size: Side of a grid cell; None: as in the recipe.
        autocast: Dtype of matrix products; None: that of the weights.
        with_tiles: Whether to write contextual tile embeddings.
        with_attention: Whether to write the attention that each tile gets.
        with_order_change: Whether to embed each slide in the other order too, and to report the
            change.
    """

    recipe: Recipe
    order: str = "row-major"
    tile_size: int | None = None
    autocast: torch.dtype | None = None
    with_tiles: bool = False
    with_attention: bool = False
    with_order_change: bool = False


@dataclass(frozen=True)
class EncodedSlide:
    """What became of a slide.

    Attributes:
        source: The feature file.
        status: `"encoded"`, `"skipped"` because its embedding is there, or `"failed"`.
        error: Why it failed; "" otherwise.
        report: Of its coordinates; None if it was not encoded.
        order_change: ‖e − e′‖ / ‖e‖ of the embedding e and that in the other order, e′.
        cells: `(L, 2)`, grid cells of its tiles, for heat-maps.
        attention: `(L,)`, for heat-maps.
    """

    source: Path
    status: str
    error: str = ""
    report: CoordinateReport | None = None
    order_change: float | None = None
    cells: NDArray[np.int64] | None = field(default=None, repr=False)
    attention: NDArray[np.float32] | None = field(default=None, repr=False)


def encode_slides(
    encoder: LongNetSlideEncoder,
    sources: Sequence[Path],
    store: EmbeddingStore,
    options: EncodingOptions,
    *,
    before: Callable[[Path], None] = lambda _: None,
) -> Iterator[EncodedSlide]:
    """Encode slides that the store lacks.

    A slide that cannot be encoded does not stop the others.

    Args:
        encoder: In evaluation mode, with `global_pool` as in the recipe.
        sources: Feature files.
        store: Gets the embeddings.
        options: How.
        before: Called with each slide before it is encoded.

    Yields:
        What became of each slide.
    """
    for source in sources:
        if store.has(source):
            yield EncodedSlide(source, "skipped")
            continue
        before(source)
        try:
            yield _encode(encoder, source, store, options)
        except (ValueError, FileNotFoundError) as error:
            yield EncodedSlide(source, "failed", error=str(error))


def _encode(
    encoder: LongNetSlideEncoder, source: Path, store: EmbeddingStore, options: EncodingOptions
) -> EncodedSlide:
    slide = read_features(source)
    placement = place(slide, options.recipe, tile_size=options.tile_size)
    report = report_coordinates(slide, placement, slide_ngrids=encoder.config.slide_ngrids)
    device = encoder.cls_token.device
    encoder.tile_size = placement.tile_size
    change, attention = None, None
    tiles: dict[str, NDArray[Any]] = {}
    enabled = options.autocast is not None
    with torch.inference_mode(), torch.autocast(device.type, options.autocast, enabled=enabled):
        given = slide_input(slide, placement, options.order, device)
        embedding = embed_slide(encoder, options.recipe, given)
        if options.with_order_change:
            change = _order_change(encoder, slide, placement, options, embedding)
        if options.with_attention:
            attention = tile_attention(encoder, given)
            tiles["attention"] = attention
        if options.with_tiles:
            tiles["tile_features"] = _tile_features(encoder, options.recipe, given)
    if not bool(embedding.isfinite().all()):
        raise ValueError(
            f"the embedding of {slide.name!r} is not finite; its features or the dtype must be at "
            f"fault, so use float32."
        )
    if tiles:
        tiles["coords"] = slide.coords
    attributes: Mapping[str, Any] = {"cell_pixels": placement.tile_size, "tiles": report.tiles}
    store.write(source, embedding.cpu().numpy(), attributes, tiles)
    cells = placement.coords // placement.tile_size
    return EncodedSlide(source, "encoded", "", report, change, cells, attention)


def _order_change(
    encoder: LongNetSlideEncoder,
    slide: SlideFeatures,
    placement: Placement,
    options: EncodingOptions,
    embedding: torch.Tensor,
) -> float:
    other = "as-given" if options.order == "row-major" else "row-major"
    given = slide_input(slide, placement, other, encoder.cls_token.device)
    difference = (embed_slide(encoder, options.recipe, given) - embedding).square().sum()
    return math.sqrt(difference.item() / embedding.square().sum().item())


def _tile_features(
    encoder: LongNetSlideEncoder, recipe: Recipe, given: SlideInput
) -> NDArray[np.float32]:
    """Contextual embeddings of the recipe's layer, before pooling and the norm behind it."""
    if recipe.layer is None:
        states = encoder.tile_states(given.tiles, given.coords)
    else:
        states = encoder.tile_states(given.tiles, given.coords, layers=[recipe.layer])[0]
    return given.in_file_order(states[0])
