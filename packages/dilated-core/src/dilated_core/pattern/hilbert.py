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
    rows = torch.arange(height, device="cpu").repeat_interleave(width)
    columns = torch.arange(width, device="cpu").repeat(height)
    return hilbert_index(rows, columns, height, width).argsort()


def hilbert_index(
    rows: torch.Tensor, columns: torch.Tensor, height: int, width: int
) -> torch.Tensor:
    """Where cells of a grid stand on the curve of `hilbert_order`, counting skipped cells too.

    Cells sorted by it are in the order of the curve, all of the grid or a few.

    Args:
        rows, columns: int64, of one shape, from 0 to below `height` and `width`.
        height, width: Rows and columns of the grid, at most 2³¹ each.

    Returns:
        int64 of that shape; equal only for equal cells.

    Example:
        >>> hilbert_index(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 2, 4)
        tensor([0, 1, 2])
    """
    along, across = (columns, rows) if width >= height else (rows, columns)
    side = 1 << max(0, min(height, width) - 1).bit_length()
    index = along // side * side**2
    x, y = along % side, across
    # The curve of a square goes through its four quarters: up, to the right, down. It ends at
    # (side − 1, 0), beside the start of the next square. In the first and the last quarter the
    # curve of half the size is mirrored.
    half = side // 2
    while half:
        right, upper = x >= half, y >= half
        first, last = ~right & ~upper, right & ~upper
        quarter = torch.where(upper, 1 + right.long(), 3 * right.long())
        index = index + quarter * half**2
        x, y = (
            torch.where(first, y, torch.where(last, half - 1 - y, x - half * right)),
            torch.where(first, x, torch.where(last, 2 * half - 1 - x, y - half)),
        )
        half //= 2
    return index
