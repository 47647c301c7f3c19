"""One slide: its embedding, contextual tile embeddings, and the attention that its tiles get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from dilated_core import attention_rows
from numpy.typing import NDArray
from torch import Tensor

from dilated_models.encoder.layer import DilatedTransformerEncoderLayer
from dilated_models.pathology.coordinates import Placement
from dilated_models.pathology.features import SlideFeatures
from dilated_models.pathology.orders import tile_order
from dilated_models.slide.encoder import LongNetSlideEncoder
from dilated_models.slide.recipes import Recipe, embed_by_recipe

_ROWS = 128


@dataclass(frozen=True)
class SlideInput:
    """A slide on the device of its encoder, in the order of the encoder's input.

    Attributes:
        tiles: `(1, L, in_chans)`.
        coords: `(1, L, 2)`.
        order: `(L,)`, the file's index of each tile.
    """

    tiles: Tensor
    coords: Tensor
    order: NDArray[np.int64]

    def in_file_order(self, x: Tensor) -> NDArray[np.float32]:
        """Numbers of tiles, `(L, …)`, in the order of the file."""
        out = np.empty(x.shape, np.float32)
        out[self.order] = x.float().cpu().numpy()
        return out


def slide_input(
    slide: SlideFeatures, placement: Placement, order: str, device: torch.device
) -> SlideInput:
    """Put a slide into an order and on a device."""
    indices = tile_order(placement.coords, order)
    tiles = torch.from_numpy(slide.features[indices])
    coords = torch.from_numpy(placement.coords[indices])
    return SlideInput(tiles[None].to(device), coords[None].to(device), indices)


def embed_slide(encoder: LongNetSlideEncoder, recipe: Recipe, given: SlideInput) -> Tensor:
    """The slide embedding of a recipe, `(E,)`, float32; the encoder has the slide's `tile_size`."""
    return embed_by_recipe(encoder, recipe, given.tiles, given.coords)[0].float()


def tile_attention(
    encoder: LongNetSlideEncoder,
    given: SlideInput,
    *,
    layer: int = -1,
    rows: int = _ROWS,
) -> NDArray[np.float32]:
    """How much attention each tile gets in a layer, as a multiple of the mean over tiles.

    With `global_pool` this is the mean over up to `rows` queries that are spread evenly over the
    tiles, and over heads; without, the attention of the class token, over heads. The class token is
    at position 0, so branches of rate r serve it in 1/r of the heads, and tiles that no branch
    selects for it get 0.

    Args:
        encoder: In evaluation mode, with the slide's `tile_size`.
        given: The slide.
        layer: Index of the layer, negative from the end.
        rows: The largest number of queries.

    Returns:
        `(L,)`, in the order of the file.
    """
    index = layer % encoder.config.depth
    x = encoder.embedded(given.tiles, given.coords)
    for before in encoder.encoder.layers[:index]:
        x = before(x)
    part = encoder.encoder.layers[index]
    assert isinstance(part, DilatedTransformerEncoderLayer)
    x = part.self_attn_layer_norm(x)
    q, k, _ = part.self_attn.project(x, x, x)
    L = given.tiles.shape[1]
    queries = [0]
    if encoder.config.global_pool:
        count = min(rows, L)
        queries = [1 + i * L // count for i in range(count)]
    seen = attention_rows(q, k, encoder.config.pattern, queries)
    received = torch.zeros(L + 2, device=x.device)  # the last entry takes what no row sees
    places = torch.where(seen.positions < 0, L + 1, seen.positions)
    received.index_add_(0, places.flatten(), seen.probabilities[0].float().flatten())
    weights = received[1 : L + 1]
    return given.in_file_order(weights / weights.mean().clamp(min=torch.finfo(torch.float32).tiny))
