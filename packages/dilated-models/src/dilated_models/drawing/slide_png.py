"""The attention that the tiles of a slide get, as a picture on their grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilated_models.drawing.png import new_figure, save_png

_LARGEST = 9.0  # inches of the longer side


def draw_slide_png(
    cells: NDArray[np.int64], values: NDArray[np.float32], path: Path, *, title: str
) -> None:
    """Write the PNG: a pixel for each cell, grey where there is no tile.

    Args:
        cells: `(L, 2)`, column and row of each tile.
        values: `(L,)`, multiples of the mean tile's attention; tiles of one cell are averaged.
            Colours span the 1st to 99th percentile.
        path: Of the file.
        title: Above the picture.
    """
    pixels = pixels_of(cells, values)
    rows, columns = pixels.shape
    scale = _LARGEST / max(rows, columns)
    figure = new_figure(max(3.0, columns * scale) + 1.5, max(2.0, rows * scale) + 0.8)
    axes = figure.add_subplot()
    axes.set_facecolor("#dee2e6")
    low, high = np.nanpercentile(pixels, (1, 99))
    image = axes.imshow(pixels, cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    bar = figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02)
    bar.set_label("attention, as a multiple of the mean tile", fontsize=9)
    save_png(figure, path)


def pixels_of(cells: NDArray[np.int64], values: NDArray[np.float32]) -> NDArray[np.float64]:
    """`(rows, columns)`, the mean value of each cell from the first to the last, NaN without tile.

    Example:
        >>> pixels_of(np.array([[3, 5], [4, 6], [4, 6]]), np.array([1.0, 2.0, 4.0]))
        array([[ 1., nan],
               [nan,  3.]])
    """
    first = cells.min(axis=0)
    columns, rows = cells.max(axis=0) - first + 1
    where = (cells[:, 1] - first[1], cells[:, 0] - first[0])
    total, count = np.zeros((rows, columns)), np.zeros((rows, columns))
    np.add.at(total, where, values)
    np.add.at(count, where, 1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)
