"""Rotary positions, with and without xPos's decay, at the positions that the caller gives.

Legend: B batch, S sequence, H heads, D head_dim.

Positions are an argument and are never counted from the tensor, so a shard of a sequence is rotated
exactly as the whole sequence is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dilated_core.checks import check_integer, check_number, check_positions

_ROTARY_BASE = 10_000.0
# The part of a dtype's exponent range that a decay may use. The rest is left to q and k.
_RANGE_SHARE = 0.9
# −log ζ of the channels that decay fastest, per `scale_base` tokens.
_DECAY = -math.log(0.4 / 1.4)


class Rotation(NamedTuple):
    """Factors that rotate (and, for xPos, scale) queries and keys.

    Attributes:
        q_cos: `(S, 1, D)`, float32 (float64 for a float64 model), times q.
        q_sin: Same shape, times q turned by a quarter.
        k_cos: Same shape, times k.
        k_sin: Same shape, times k turned by a quarter.
    """

    q_cos: Tensor
    q_sin: Tensor
    k_cos: Tensor
    k_sin: Tensor


def rotation_at(
    positions: Tensor,
    head_dim: int,
    *,
    scale_base: float | None = 512.0,
    center: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Rotation:
    """Rotation factors of the given positions.

    Pair i of the D/2 neighbouring channel pairs turns by n · 10000^(−2i/D) at position n (RoPE,
    arXiv 2104.09864, eq. 15). xPos (arXiv 2212.10554, algorithm 1) also multiplies q by
    ζᵢ^(n/scale_base) and divides k by it, ζᵢ = (2i/D + 0.4) / 1.4, so a score decays with the
    distance of its query and key.

    Args:
        positions: `(S,)`, integer, the absolute position of each row, in tokens.
        head_dim: D, even.
        scale_base: Distance over which the decay is one factor ζ, in tokens; None is plain RoPE.
        center: Position at which the xPos factor is 1. It cancels in every score and only keeps
            the factors in range; it must be the same wherever q and k of one sequence are rotated.
        dtype: float32 or float64, of the factors. Angles are computed in float64, so they are
            off by 1e-16 of the position; on Apple's GPUs, which lack float64, in float32.

    Returns:
        Factors that broadcast over `(B, S, H, D)`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If positions do not have one dimension, `head_dim` is not even, or `scale_base`
            is not above 0.

    Example:
        >>> rotation = rotation_at(torch.arange(3), head_dim=4)
        >>> rotation.q_cos.shape
        torch.Size([3, 1, 4])
        >>> rotation.q_cos[0].tolist()  # position 0 is left as it is
        [[1.0, 1.0, 1.0, 1.0]]
    """
    check_positions("positions", positions)
    head_dim = check_integer("head_dim", head_dim, at_least=2)
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; it must be even, as channels turn in pairs.")
    if scale_base is not None:
        check_number("scale_base", scale_base, above=0, fix=", or None for plain RoPE")
    center = check_integer("center", center)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype is {dtype!r}; it must be torch.float32 or torch.float64.")
    # Angles grow with the position: in float32 they would be wrong by 0.06 rad at a million tokens.
    # Apple's GPUs have no float64.
    precise = torch.float32 if positions.device.type == "mps" else torch.float64
    pair = torch.arange(0, head_dim, 2, device=positions.device, dtype=precise) / head_dim
    angle = positions.to(precise)[:, None] * _ROTARY_BASE**-pair
    cos, sin = angle.cos(), angle.sin()
    if scale_base is None:
        factors = (cos, sin, cos, sin)
    else:
        # Narrow integers, unsigned ones above all, cannot hold differences of their values.
        exponent = (positions.long() - center).to(precise)[:, None] / scale_base
        decay = ((pair + 0.4) / 1.4) ** exponent
        factors = (cos * decay, sin * decay, cos / decay, sin / decay)
    return Rotation(*(f.to(dtype).repeat_interleave(2, dim=-1)[:, None] for f in factors))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring channels of `x`, `(B, S, H, D)`, by its position's angle.

    Args:
        x: Queries or keys.
        cos: `(S, 1, D)` from `rotation_at`.
        sin: `(S, 1, D)` from the same rotation.

    Returns:
        Same shape and dtype as `x`; computed in the dtype of `cos`, or that of `x` if it is wider.
    """
    even, odd = x[..., ::2], x[..., 1::2]
    quarter_turn = torch.stack((-odd, even), dim=-1).flatten(-2)
    return (x * cos + quarter_turn * sin).to(x.dtype)


def decay_reach(scale_base: float, dtype: torch.dtype) -> int:
    """Largest distance from the center, in tokens, at which xPos' factor is in range of `dtype`."""
    limit = -_RANGE_SHARE * math.log(torch.finfo(dtype).tiny)
    return math.floor(limit * scale_base / _DECAY)


def check_decay_range(largest_distance: int, scale_base: float, dtype: torch.dtype) -> None:
    """Refuse positions whose xPos factor would leave the range of `dtype`.

    Args:
        largest_distance: Largest distance of a position from the center, in tokens.
        scale_base: As in `rotation_at`.
        dtype: Of q and k.

    Raises:
        ValueError: If the largest factor or its inverse would overflow or become subnormal.
    """
    reach = decay_reach(scale_base, dtype)
    if largest_distance > reach:
        needed = math.ceil(scale_base * largest_distance / max(1, reach))
        raise ValueError(
            f"xPos with a scale base of {scale_base:g} stays within the range of {dtype} up to "
            f"{reach} positions from the center, but {largest_distance} are needed; use a scale "
            f"base of {needed} or more, or plain RoPE, which has none."
        )
