"""What five programs call the slide embedding of GigaPath: pooling, layer, norm, coordinates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dilated_models.slide.encoder import LongNetSlideEncoder

Coordinates = Literal["as_given", "level0_tile", "rescaled"]


@dataclass(frozen=True)
class Recipe:
    """How a program makes one embedding of a slide.

    Attributes:
        global_pool: Whether it is the mean over tiles instead of the class token.
        layer: Index, from the end, of the hidden state that is pooled, before the encoder's final
            LayerNorm; None: the encoder's output, behind that LayerNorm.
        coordinates: `"as_given"`: a cell has 256 pixels of the coordinates as they are.
            `"level0_tile"`: a cell is as large as a tile is on level 0. `"rescaled"`: coordinates
            are scaled from level 0 to the tiles' level, where a cell has 256 pixels.
        source: Which code it follows.
    """

    global_pool: bool
    layer: int | None
    coordinates: Coordinates
    source: str


RECIPES: Mapping[str, Recipe] = {
    "official": Recipe(False, -1, "as_given", "gigapath/pipeline.py, 09d8e87"),
    "trident": Recipe(True, -2, "level0_tile", "trident/slide_encoder_models/load.py, a91fa84"),
    "slide2vec": Recipe(False, None, "rescaled", "slide2vec/encoders/models/gigapath.py, 7cfa6bf"),
    "lazyslide": Recipe(False, None, "as_given", "lazyslide_models/vision/gigapath.py"),
    "raw2features": Recipe(
        True, -1, "level0_tile", "raw2features/slide_embedders/gigapath_slide.py, 079f877"
    ),
}
"""TRIDENT takes state 11 of the 13 of a 12-layer encoder: the last but one."""


def recipe_called(name: str) -> Recipe:
    """The recipe with a name.

    Raises:
        ValueError: If there is none.

    Example:
        >>> recipe_called("trident").global_pool
        True
    """
    if name not in RECIPES:
        raise ValueError(f"recipe is {name!r}; it must be one of {', '.join(map(repr, RECIPES))}.")
    return RECIPES[name]


def embed_by_recipe(
    encoder: LongNetSlideEncoder, recipe: Recipe, tiles: Tensor, coords: Tensor
) -> Tensor:
    """The slide embeddings of a recipe, `(B, E)`.

    The encoder's `tile_size` and `coords` must be those that `recipe.coordinates` tells.

    Args:
        encoder: With `global_pool` as in the recipe.
        recipe: Which embedding.
        tiles: As `LongNetSlideEncoder.forward`.
        coords: As `LongNetSlideEncoder.forward`.

    Raises:
        ValueError: If the encoder pools otherwise.
    """
    if encoder.config.global_pool != recipe.global_pool:
        raise ValueError(
            f"the encoder has global_pool={encoder.config.global_pool}; it must be "
            f"{recipe.global_pool} for this recipe, so build it with that."
        )
    if recipe.layer is None:
        return encoder.embed(tiles, coords)
    return encoder.embed(tiles, coords, all_layers=True)[recipe.layer]
