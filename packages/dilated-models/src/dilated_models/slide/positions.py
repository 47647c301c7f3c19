"""Grid cells of tiles, and the sines and cosines that a cell adds to a tile's embedding."""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 10_000.0


def grid_cells(coords: Tensor, tile_size: int) -> Tensor:
    """⌊coords / tile_size⌋ as int64, of the shape of `coords`.

    Example:
        >>> grid_cells(torch.tensor([[0, 255], [256, 512]]), 256)
        tensor([[0, 0],
                [1, 2]])
    """
    if coords.is_floating_point():
        return torch.floor(coords / tile_size).long()
    return torch.div(coords, tile_size, rounding_mode="floor").long()


def check_cells(cells: Tensor, slide_ngrids: int, tile_size: int) -> None:
    """Refuse tiles outside the grid, whose positions the published code takes from other cells.

    Compiled code does not check: it would have to wait for the values.

    Raises:
        ValueError: If there is one.
    """
    if cells.is_meta or not cells.numel() or torch.compiler.is_compiling():
        return
    outside = ((cells < 0) | (cells >= slide_ngrids)).any(-1)
    if bool(outside.any()):
        first = cells[outside][0]
        raise ValueError(
            f"{int(outside.sum())} of {outside.numel()} tiles lie outside the grid of "
            f"{slide_ngrids} × {slide_ngrids} cells, the first in cell ({int(first[0])}, "
            f"{int(first[1])}) at a tile_size of {tile_size}; coordinates must be pixels of the "
            f"level that tile_size counts, so give the tile_size of their level, such as "
            f"patch_size_level0."
        )


def cell_embeddings(cells: Tensor, slide_ngrids: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Sines and cosines of cells (MAE, arXiv 2111.06377), one table for both of their indices.

    The published code keeps a table of all cells instead: 3 GB for 1000 × 1000 of width 768. A
    half of the channels encodes the second index, and the other half the first.

    Args:
        cells: int64 `(…, 2)`, each in [0, slide_ngrids).
        slide_ngrids: Cells per side of the grid.
        dim: Channels, a multiple of 4.
        dtype: Of the result.

    Returns:
        `(…, dim)`, computed in float64.

    Example:
        >>> cell_embeddings(torch.tensor([[0, 0]]), 10, 8, torch.float32)
        tensor([[0., 0., 1., 1., 0., 0., 1., 1.]])
    """
    # On the CPU, as MPS has no float64: 5 ms for 1000 cells.
    exponents = torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim / 4)
    indices = torch.arange(slide_ngrids, dtype=torch.float64, device="cpu")
    angles = indices[:, None] * (1 / _BASE**exponents)
    table = torch.cat((angles.sin(), angles.cos()), dim=-1).to(cells.device, dtype)
    return torch.cat((table[cells[..., 1]], table[cells[..., 0]]), dim=-1)
