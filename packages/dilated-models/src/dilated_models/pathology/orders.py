"""Orders of tiles: the order is a part of a slide encoder's input."""

from __future__ import annotations

from typing import Literal

import numpy as np
from dilated_core.checks import check_choice
from numpy.typing import NDArray

Order = Literal["row-major", "as-given"]
ORDERS: tuple[str, ...] = ("row-major", "as-given")


def tile_order(coords: NDArray[np.int64], order: Order | str) -> NDArray[np.int64]:
    """Indices that put tiles in an order.

    Args:
        coords: `(L, 2)`, (x, y) of each tile.
        order: `"row-major"`: row by row from the top, each from the left, as GigaPath's pretraining
            serialises slides (Nature 2024, figure 1). Tiles at one place keep their order.
            `"as-given"`: that of the file.

    Raises:
        ValueError: If the order is another.

    Example:
        >>> tile_order(np.array([[256, 256], [0, 256], [256, 0]]), "row-major").tolist()
        [2, 1, 0]
    """
    check_choice("order", order, ORDERS)
    if order == "as-given":
        return np.arange(len(coords))
    return np.lexsort((coords[:, 0], coords[:, 1]))
