"""The order in which the tiles of a launch start: segment by segment, or along a Hilbert curve.

Tiles that run at one time share the second-level cache. In segment order they share keys already,
because all tiles of a segment read the same keys. Along the curve a group of tiles covers fewer
segments if a segment has more tiles than run at one time. Only a measurement can tell which order
is faster (docs/kernels.md). No tile depends on another, so the results are the same to the bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, get_args

import torch
from dilated_core.pattern.hilbert import hilbert_order

TileOrder = Literal["row_major", "hilbert"]


def check_tile_order(tile_order: str) -> None:
    """Refuse an unknown order.

    Raises:
        ValueError: Naming the known ones.
    """
    if tile_order not in get_args(TileOrder):
        names = ", ".join(map(repr, get_args(TileOrder)))
        raise ValueError(f"tile_order is {tile_order!r}; it must be one of {names}.")


@lru_cache(maxsize=64)
def order_table(
    tile_order: TileOrder, num_segments: int, tiles: int, device: torch.device
) -> torch.Tensor | None:
    """The cells segment · tiles + tile in the order of their start, int32; None if they ascend."""
    if tile_order == "row_major" or num_segments == 1 or tiles == 1:
        return None
    return hilbert_order(num_segments, tiles).to(device, torch.int32)
