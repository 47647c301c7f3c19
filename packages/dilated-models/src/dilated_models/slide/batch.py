"""Slides of equal or different sizes as one input of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from dilated_core.checks import check_tensor
from torch import Tensor


class SlideBatch(NamedTuple):
    """Tiles of several slides.

    Attributes:
        tiles: `(B, L, in_chans)`; `(T, in_chans)` for slides that are packed one after another.
        coords: `(B, L, 2)`; `(T, 2)`.
        lengths: Of packed slides, tiles of each; None for slides of equal size.
        cu_seqlens: Of packed slides, where each begins once every slide has a class token.
    """

    tiles: Tensor
    coords: Tensor
    lengths: tuple[int, ...] | None
    cu_seqlens: Tensor | None

    def with_class_tokens(self, x: Tensor, cls_token: Tensor) -> Tensor:
        """Put the class token, `(1, 1, E)`, before the tiles of each slide."""
        if self.lengths is None:
            return torch.cat((cls_token.to(x.dtype).expand(len(x), -1, -1), x), dim=1)
        token = cls_token[0].to(x.dtype)
        parts: list[Tensor] = []
        start = 0
        for length in self.lengths:
            parts += [token, x[start : start + length]]
            start += length
        return torch.cat(parts)

    def first(self, x: Tensor) -> Tensor:
        """The class token of each slide, `(B, E)`."""
        if self.cu_seqlens is None:
            return x[:, 0]
        return x[self.cu_seqlens[:-1].long()]

    def mean_of_tiles(self, x: Tensor) -> Tensor:
        """The mean over the tiles of each slide, `(B, E)`."""
        if self.lengths is None:
            return x[:, 1:].mean(1)
        ends = list(accumulate(1 + length for length in self.lengths))
        slides = zip(ends, self.lengths, strict=True)
        return torch.stack([x[end - length : end].mean(0) for end, length in slides])


def batch_of(
    tiles: Tensor | Sequence[Tensor],
    coords: Tensor | Sequence[Tensor],
    key_padding_mask: Tensor | None,
    in_chans: int,
) -> SlideBatch:
    """Check and gather the arguments of a slide encoder.

    Padding is taken out, so that slides are packed and none sees another's padding.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit, or a slide has no tile.
    """
    if isinstance(tiles, Tensor) and isinstance(coords, Tensor):
        _check_pair(tiles, coords, in_chans, dims=3)
        if key_padding_mask is None:
            return SlideBatch(tiles, coords, None, None)
        check_tensor("key_padding_mask", key_padding_mask)
        if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != tiles.shape[:2]:
            raise ValueError(
                f"key_padding_mask has shape {tuple(key_padding_mask.shape)} and dtype "
                f"{key_padding_mask.dtype}; it must be bool of shape {tuple(tiles.shape[:2])}, "
                f"True for rows that are padding."
            )
        kept = [~padding for padding in key_padding_mask]
        tiles = [slide[rows] for slide, rows in zip(tiles, kept, strict=True)]
        coords = [slide[rows.to(slide.device)] for slide, rows in zip(coords, kept, strict=True)]
    elif key_padding_mask is not None:
        raise ValueError("key_padding_mask is given for a list of slides, which has no padding.")
    if isinstance(tiles, Tensor) or isinstance(coords, Tensor):
        raise TypeError("tiles and coords must both be tensors, or both lists of tensors.")
    if not len(tiles) or len(tiles) != len(coords):
        raise ValueError(
            f"tiles has {len(tiles)} slides and coords {len(coords)}; they must have equally many, "
            f"at least one."
        )
    for slide, where in zip(tiles, coords, strict=True):
        _check_pair(slide, where, in_chans, dims=2)
    lengths = tuple(len(slide) for slide in tiles)
    starts = torch.tensor([0, *(1 + length for length in lengths)]).cumsum(0)
    return SlideBatch(
        torch.cat(list(tiles)),
        torch.cat([where.to(coords[0].dtype) for where in coords]),
        lengths,
        starts.to(tiles[0].device),
    )


def _check_pair(tiles: object, coords: object, in_chans: int, *, dims: int) -> None:
    """Refuse tiles and coordinates of one slide, or of slides of equal size, that do not fit."""
    check_tensor("tiles", tiles)
    check_tensor("coords", coords)
    tiles, coords = cast(Tensor, tiles), cast(Tensor, coords)
    rows = "(B, L" if dims == 3 else "(L"
    if tiles.dim() != dims or tiles.shape[-1] != in_chans:
        raise ValueError(
            f"tiles has shape {tuple(tiles.shape)}; it must be {rows}, {in_chans}), as the "
            f"encoder's tile embeddings have {in_chans} channels."
        )
    if coords.shape != (*tiles.shape[:-1], 2):
        raise ValueError(
            f"coords has shape {tuple(coords.shape)} and tiles {tuple(tiles.shape)}; it must be "
            f"{(*tiles.shape[:-1], 2)}, the pixels of each tile's corner."
        )
    if not tiles.shape[-2]:
        raise ValueError("a slide has no tile; it must have at least one, so leave it out.")
    if not tiles.is_floating_point():
        raise TypeError(f"tiles has dtype {tiles.dtype}; it must be floating.")
    if coords.dtype == torch.bool or coords.is_complex():
        raise TypeError(f"coords has dtype {coords.dtype}; it must be integers or floating.")
