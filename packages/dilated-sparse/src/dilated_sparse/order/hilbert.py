"""Tokens of a grid along a Hilbert curve, so that segments and blocks hold neighbours.

Row by row, a segment of w tokens of a wide grid is a strip of one or two rows. Along the curve it
is about a square, so more neighbours of a token are in its segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from dilated_core.checks import check_integer, check_tensor
from dilated_core.pattern.hilbert import hilbert_index


def hilbert_token_order(
    coordinates: torch.Tensor,
    *,
    padding_mask: torch.Tensor | None = None,
    grid: tuple[int, int] | None = None,
) -> torch.Tensor:
    """The order in which a Hilbert curve visits tokens at some cells of a grid.

    `hilbert_order(height, width)` is the same for all cells of a grid. Cells may be missing, as
    in the tissue of a slide, and the grid may be any rectangle.

    Args:
        coordinates: `(N, 2)` or `(B, N, 2)`, integers from 0 on: row and column of each token.
            Divide pixels by the size of a tile first.
        padding_mask: `(N,)` or `(B, N)` bool, True for tokens that are padding. They stay behind
            the others, in the order they have; their coordinates may be anything.
        grid: Height and width of the grid; None: as far as the coordinates of each sequence go.
            Of one slide, two crops get orders that agree only with one grid for both.

    Returns:
        int64 `(N,)` or `(B, N)`: which token comes first, second, …. Tokens of one cell stay in the
        order they have. `order.argsort(-1)` is the inverse.

    Raises:
        TypeError: If coordinates are no integers, or the mask is no bool tensor.
        ValueError: If a shape does not fit, or a coordinate is below 0 or outside of the grid.

    Example:
        >>> coordinates = torch.tensor([[0, 0], [0, 3], [1, 0], [1, 3], [1, 1]])
        >>> hilbert_token_order(coordinates)
        tensor([0, 2, 4, 3, 1])
    """
    check_tensor("coordinates", coordinates)
    if coordinates.is_floating_point() or coordinates.dtype == torch.bool:
        raise TypeError(
            f"coordinates have dtype {coordinates.dtype}; they must be integers, the row and the "
            f"column of each token, so use (pixels // tile_size).long()."
        )
    if coordinates.dim() not in (2, 3) or coordinates.shape[-1] != 2:
        raise ValueError(
            f"coordinates have shape {tuple(coordinates.shape)}; it must be (N, 2) or (B, N, 2)."
        )
    cells = coordinates.long()
    if padding_mask is not None:
        check_tensor("padding_mask", padding_mask)
        if padding_mask.dtype != torch.bool:
            raise TypeError(f"padding_mask has dtype {padding_mask.dtype}; it must be bool.")
        if padding_mask.shape != cells.shape[:-1]:
            raise ValueError(
                f"padding_mask has shape {tuple(padding_mask.shape)} and coordinates "
                f"{tuple(cells.shape)}; it must be {tuple(cells.shape[:-1])}."
            )
        cells = cells.masked_fill(padding_mask.unsqueeze(-1), 0)
    if grid is not None:
        grid = (
            check_integer("height of the grid", grid[0], at_least=1),
            check_integer("width of the grid", grid[1], at_least=1),
        )
    _check_inside(cells, grid)
    if cells.dim() == 2:
        return _order(cells, padding_mask, grid)
    masks = [None] * len(cells) if padding_mask is None else list(padding_mask)
    orders = [_order(x, mask, grid) for x, mask in zip(cells, masks, strict=True)]
    return torch.stack(orders) if orders else cells.new_empty(cells.shape[:2])


def attend_in_order(
    attention: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    order: torch.Tensor,
    *,
    key_padding_mask: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Attention whose segments or blocks are cut from tokens in another order.

    Tokens and mask are put in that order, and the result is put back. Whatever belongs to a token
    stays with it: turn q and k by their positions, or add embeddings of positions, before.

    With `is_causal=True` a token sees those that come before it *in the order*, and no others. For
    texts, where the future must stay hidden, an order of another kind than the text's own has no
    meaning.

    Args:
        attention: Called with q, k, v, the mask if there is one, and the options, such as
            `dilated_core.dilated_attention` with `pattern=`, or a module.
        q: `(B, S, H, D)`.
        k, v: `(B, S, H_kv, D)`.
        order: `(S,)` or `(B, S)` int64, a permutation such as `hilbert_token_order` returns.
        key_padding_mask: `(B, S)` bool, True for keys that nobody sees, in the order of k.
        **options: For `attention`.

    Returns:
        `(B, S, H, D)`, row i for token i of q.

    Raises:
        TypeError: If the order is no int64 tensor.
        ValueError: If the order has another shape, or is no permutation.

    Example:
        >>> from dilated_core import DilatedPattern, dilated_attention
        >>> from dilated_sparse import hilbert_order
        >>> q, k, v = torch.randn(3, 1, 8 * 8, 4, 16).unbind()  # an image of 8 × 8 tiles
        >>> attend_in_order(
        ...     dilated_attention, q, k, v, hilbert_order(8, 8), pattern=DilatedPattern([16], [1])
        ... ).shape
        torch.Size([1, 64, 4, 16])
    """
    check_tensor("q", q)
    check_tensor("order", order)
    if order.dtype != torch.int64:
        raise TypeError(f"order has dtype {order.dtype}; it must be int64.")
    if order.shape not in (q.shape[:2], q.shape[1:2]):
        raise ValueError(
            f"order has shape {tuple(order.shape)} and q {tuple(q.shape)}; it must be "
            f"(positions,) or (batch, positions)."
        )
    order = order.to(q.device).expand(q.shape[:2])
    inverse = order.argsort(-1)
    if not bool((order.gather(1, inverse) == torch.arange(q.shape[1], device=q.device)).all()):
        raise ValueError("order is no permutation; it must hold each of 0 … S − 1 once.")
    if key_padding_mask is not None:
        check_tensor("key_padding_mask", key_padding_mask)
        options["key_padding_mask"] = key_padding_mask.gather(1, order)
    out = attention(*(_taken(x, order) for x in (q, k, v)), **options)
    return _taken(out, inverse)


def _order(
    cells: torch.Tensor, padding_mask: torch.Tensor | None, grid: tuple[int, int] | None
) -> torch.Tensor:
    if not len(cells):
        return cells.new_empty(0)
    if grid is None:
        grid = int(cells[:, 0].max()) + 1, int(cells[:, 1].max()) + 1
    index = hilbert_index(cells[:, 0], cells[:, 1], *grid)
    if padding_mask is not None:
        index = index.masked_fill(padding_mask, torch.iinfo(torch.int64).max)
    return index.argsort(stable=True)


def _check_inside(cells: torch.Tensor, grid: tuple[int, int] | None) -> None:
    if not cells.numel():
        return
    flat = cells.reshape(-1, 2)
    smallest, largest = int(flat.amin()), flat.amax(0)
    if smallest < 0:
        raise ValueError(f"a coordinate is {smallest}; it must be at least 0.")
    rows, columns = int(largest[0]), int(largest[1])
    limit = (2**31, 2**31) if grid is None else grid
    if rows >= limit[0] or columns >= limit[1]:
        raise ValueError(
            f"coordinates go as far as row {rows} and column {columns}; they must be below "
            f"{limit[0]} and {limit[1]}."
        )


def _taken(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Rows of `(B, S, …)` in the order `(B, S)`."""
    return x.take_along_dim(order.view(*order.shape, *[1] * (x.dim() - 2)), dim=1)
