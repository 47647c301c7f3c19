"""Cells of a grid in the order of a Hilbert curve: neighbours in time are neighbours in space."""

from __future__ import annotations

import torch

from dilated_core.checks import check_integer


def hilbert_order(height: int, width: int) -> torch.Tensor:
    """All cells of a grid along a Hilbert curve.

    The longer side is cut into squares, whose side is the shorter side rounded up to a power of
    two. The curve of each square ends beside the start of the next one. Where a square overhangs
    the grid, the curve skips the cells that do not exist.

    Args:
        height, width: Rows and columns of the grid, any numbers.

    Returns:
        int64 `(height · width,)` on the CPU: numbers row · width + column, each once.

    Raises:
        TypeError: If a side is no integer.
        ValueError: If a side is negative.

    Example:
        >>> hilbert_order(2, 4)
        tensor([0, 4, 5, 1, 2, 6, 7, 3])
    """
    height = check_integer("height", height, at_least=0)
    width = check_integer("width", width, at_least=0)
    short, long = sorted((height, width))
    if short == 0:
        return torch.empty(0, dtype=torch.int64, device="cpu")
    side = 1 << (short - 1).bit_length()
    along, across = _square(side)
    along = (torch.arange(0, long, side, device="cpu")[:, None] + along).flatten()
    across = across.repeat(-(-long // side))
    exists = (along < long) & (across < short)
    along, across = along[exists], across[exists]
    return across * width + along if width >= height else along * width + across


def _square(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The curve through a square from (0, 0) to (side − 1, 0): both coordinates of each step.

    Four curves of half the size make the next one: the first and the last mirrored.
    """
    x = y = torch.zeros(1, dtype=torch.int64, device="cpu")
    size = 1
    while size < side:
        x, y = (
            torch.cat([y, x, x + size, 2 * size - 1 - y]),
            torch.cat([x, y + size, y + size, size - 1 - x]),
        )
        size *= 2
    return x, y
