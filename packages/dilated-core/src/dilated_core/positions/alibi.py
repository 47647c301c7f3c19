"""ALiBi, a bias of the scores, as extra channels of q and k: attention itself takes no bias.

Legend: B batch, S sequence, H heads, D head_dim, M query rows, N key rows.

ALiBi (Press et al., arXiv 2108.12409) adds −mₕ·(i − j) to the score of query i and key j ≤ i. Both
−mₕ·i and mₕ·j are products of a factor of the query and a factor of the key, so a few more channels
of q and k add them to the score, in every backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from dilated_core.checks import (
    check_head_range,
    check_integer,
    check_positions,
    check_tensor,
    is_listed,
)
from dilated_core.inputs import check_scale

# Positions have at most this many bits.
_POSITION_BITS = 24
# Moved from the channel of the query to that of the key, so that float16 can hold both.
_CONSTANT = 2.0**15
# GPU kernels load rows in units of this many channels.
_CHANNEL_MULTIPLE = 8


class _Digits(NamedTuple):
    """How a number is cut so that each piece, and each product of two, is exact in float32."""

    slope_bits: int
    slope_parts: int
    digit_bits: int


_DIGITS = {
    torch.float64: _Digits(53, 1, 24),
    torch.float32: _Digits(12, 2, 12),
    torch.bfloat16: _Digits(8, 3, 8),
    torch.float16: _Digits(8, 3, 8),
}


class AlibiInputs(NamedTuple):
    """Arguments of attention that make it compute ALiBi.

    Attributes:
        q: `(B, S, H, D')`: the channels of positions, the D channels of the given q, zeros.
        k: `(B, S, H_kv, D')`, likewise.
        v: `(B, S, H_kv, D')`: the D channels of the given v, zeros.
        scale: Factor of the scores, to be passed to attention; its default would be 1/√D'.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float


def alibi_slopes(num_heads: int, *, head_range: Sequence[int] | None = None) -> tuple[float, ...]:
    """The slopes m of ALiBi (arXiv 2108.12409, section 3), one per head.

    2^(−8·(h+1)/H) if H is a power of two. Otherwise the slopes of the next smaller power of two,
    followed by every second slope of the next larger one, as in the authors' code.

    Args:
        num_heads: H.
        head_range: `(first, total)` if the H heads are those from `first` on of `total` heads,
            which then have the slopes of these.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If `num_heads` is below 1, or the heads are not among `total`.

    Example:
        >>> alibi_slopes(4)
        (0.25, 0.0625, 0.015625, 0.00390625)
        >>> alibi_slopes(6) == alibi_slopes(4) + alibi_slopes(8)[0:4:2]
        True
        >>> alibi_slopes(2, head_range=(4, 6)) == alibi_slopes(6)[4:]
        True
    """
    num_heads = check_integer("num_heads", num_heads, at_least=1)
    first, total = check_head_range(head_range, num_heads)

    def of_power_of_two(heads: int) -> tuple[float, ...]:
        return tuple(2.0 ** (-8 * (head + 1) / heads) for head in range(heads))

    smaller = 1 << (total.bit_length() - 1)
    slopes = of_power_of_two(smaller) + of_power_of_two(2 * smaller)[::2]
    return slopes[first : first + num_heads]


def alibi_bias(
    q_positions: Tensor,
    k_positions: Tensor,
    slopes: Sequence[float],
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense causal bias −mₕ·(i − j), for tests and plots.

    Args:
        q_positions: `(M,)`, integer, position i of each query.
        k_positions: `(N,)`, integer, position j of each key.
        slopes: m of each head.
        dtype: Of the result.

    Returns:
        `(H, M, N)`; −∞ where j > i.

    Raises:
        TypeError: If positions are not integers, or slopes is no list of numbers.
        ValueError: If positions do not have one dimension.

    Example:
        >>> alibi_bias(torch.arange(2), torch.arange(2), [0.5])
        tensor([[[ 0.0000,    -inf],
                 [-0.5000,  0.0000]]])
    """
    check_positions("q_positions", q_positions)
    check_positions("k_positions", k_positions)
    slopes = _checked_slopes(slopes)
    # Narrow integers, unsigned ones above all, cannot hold differences of their values.
    difference = (k_positions.long() - q_positions.long()[:, None]).to(dtype)
    m = torch.tensor(slopes, dtype=dtype, device=difference.device)
    return torch.where(difference <= 0, m[:, None, None] * difference, -math.inf)


def with_alibi(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    scale: float | None = None,
    slopes: Sequence[float] | None = None,
    head_range: Sequence[int] | None = None,
) -> AlibiInputs:
    """Widen q, k and v so that causal attention on them is attention with ALiBi.

    The first D channels of `dilated_attention(q', k', v', pattern, is_causal=True, scale=scale')`
    are the result, and lse is that of the biased scores. Gradients of q, k and v are exact. The
    symmetric bias −m·|i − j| of non-causal attention is no such product, so `is_causal=True` is
    required: without it the result has no meaning.

    Low precision cannot represent positions. A position is therefore written in digits, and a slope
    as a sum of parts that together have 24 bits; digits, parts and their products are exact in
    float32. Channels go from high digits to low ones and subtract −m·i on the way, so an
    accumulator that sums exact products in this order keeps the accuracy of the dtype at any
    position. Kernels choose their own order, and some multiply q by the scale first. In every
    kernel, a score is off by at most about m·position·2⁻²⁴ in absolute terms (2⁻⁵³ in float64). For
    a slope of ½, this is 2·10⁻³ at position 65 536 and 3·10⁻² at a million. Only differences of
    positions count, so let the positions of each document begin at 0.

    Args:
        q: `(B, S, H, D)`.
        k, v: `(B, S, H_kv, D)`, H_kv dividing H.
        positions: `(S,)`, integer, the position of each row in the whole sequence (not in its
            shard), from 0 to 2²⁴ − 1. The range is checked only on the CPU outside `torch.compile`,
            where the check needs no synchronisation. Positions beyond it give wrong results.
        scale: Factor of q·k; 1/√D if None. It does not apply to the bias.
        slopes: m of each head of q; `alibi_slopes(H, head_range=head_range)` if None.
        head_range: `(first, total)` if the H heads are those from `first` on of `total` heads, as
            for `dilated_attention`. Only without `slopes`, which are those of the heads at hand.

    Returns:
        q, k, v of D' = D + 8 channels (D + 16 in bfloat16 and float16), rounded up to a multiple of
        8, in the dtype given; and the scale to pass on.

    Raises:
        TypeError: If the dtype has no such digits, or positions are not integers.
        ValueError: If shapes or devices do not fit, positions are out of range, scale is 0 or not
            finite, the slopes over the scale exceed what float16 holds, or `slopes` and
            `head_range` are both given.

    Example:
        >>> from dilated_core import DilatedPattern, dilated_attention
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()
        >>> q2, k2, v2, scale = with_alibi(q, k, v, torch.arange(100))
        >>> q2.shape, scale
        (torch.Size([1, 100, 4, 24]), 0.25)
        >>> pattern = DilatedPattern([16, 64], [1, 4])
        >>> out = dilated_attention(q2, k2, v2, pattern, is_causal=True, scale=scale)[..., :16]
    """
    scale = _check(q, k, v, positions, scale)
    H, D = q.shape[2:]
    if slopes is not None and head_range is not None:
        raise ValueError(
            "slopes and head_range are both given; slopes are those of the heads at hand, so leave "
            "out head_range."
        )
    if slopes is None:
        slopes = alibi_slopes(H, head_range=head_range)
    slopes = _checked_slopes(slopes)
    if len(slopes) != H:
        raise ValueError(f"slopes has {len(slopes)} entries and q {H} heads; give one per head.")
    # The kernel multiplies every channel by the scale, and the product must be m.
    per_channel = [m / scale for m in slopes]
    _check_range(per_channel, scale, q.dtype)
    q_position, k_position = _position_channels(positions.long(), per_channel, q.dtype)
    width = q_position.shape[-1] + D
    filler = -width % _CHANNEL_MULTIPLE

    def joined(channels: Tensor, x: Tensor) -> Tensor:
        return pad(torch.cat([channels.expand(*x.shape[:3], -1), x], dim=-1), (0, filler))

    return AlibiInputs(
        joined(q_position, q), joined(k_position, k), pad(v, (0, width + filler - D)), scale
    )


def _position_channels(
    positions: Tensor, slopes: Sequence[float], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Channels `(S, H, C)` of q and `(S, 1, C)` of k whose dot product is about m·(j − i).

    For each digit of j, from the highest to the lowest: one channel per part of the slope, and
    after the first part a channel with as much of −m·i as one number of the dtype can hold, so that
    the sum is small before the finer parts are added. −m·i is the same for all keys of a query, so
    its rounding cancels in the softmax.
    """
    slope_bits, slope_parts, digit_bits = _DIGITS[dtype]
    # Apple's GPUs have no float64.
    precise = torch.float32 if positions.device.type == "mps" else torch.float64
    m = torch.tensor(slopes, dtype=precise, device=positions.device)
    parts = zip(*(_split(slope, slope_bits, slope_parts) for slope in slopes), strict=True)
    part_H = [torch.tensor(part, dtype=precise, device=positions.device) for part in parts]
    rest_SH = positions[:, None].to(precise) * m
    q_channels: list[Tensor] = []
    k_channels: list[Tensor] = []
    for low_bit in reversed(range(0, _POSITION_BITS, digit_bits)):
        digit_S = (positions >> low_bit) & ((1 << digit_bits) - 1)
        # q and k share the weight of the digit, to stay in the range of float16.
        q_weight = 2.0 ** (low_bit - low_bit // 2)
        k_weight = 2.0 ** (low_bit // 2)
        constant_SH = (rest_SH / _CONSTANT).to(dtype)
        rest_SH = rest_SH - constant_SH.to(precise) * _CONSTANT
        for index, part in enumerate(part_H):
            q_channels.append((part * q_weight).to(dtype).expand_as(rest_SH))
            k_channels.append((digit_S * k_weight).to(dtype))
            if index == 0:
                q_channels.append(-constant_SH)
                k_channels.append(torch.full_like(k_channels[-1], _CONSTANT))
    q_SHC, k_S1C = torch.stack(q_channels, dim=-1), torch.stack(k_channels, dim=-1)[:, None]
    filler = (0, -q_SHC.shape[-1] % _CHANNEL_MULTIPLE)
    return pad(q_SHC, filler), pad(k_S1C, filler)


def _split(x: float, bits: int, parts: int) -> list[float]:
    """Numbers of `bits` significant bits each, whose sum is x to bits·parts bits or better."""
    found: list[float] = []
    for _ in range(parts):
        mantissa, exponent = math.frexp(x)
        found.append(math.ldexp(round(math.ldexp(mantissa, bits)), exponent - bits))
        x -= found[-1]
    return found


def _check(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, scale: float | None) -> float:
    """Check the arguments of `with_alibi`, and return the scale to use."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have the four dimensions "
                f"(batch, sequence, heads, head_dim)."
            )
        if x.dtype not in _DIGITS:
            raise TypeError(
                f"{name} has dtype {x.dtype}; ALiBi's digits exist for "
                f"{', '.join(str(dtype) for dtype in _DIGITS)}."
            )
        if x.dtype != q.dtype:
            raise TypeError(
                f"q has dtype {q.dtype} and {name} {x.dtype}; they must be equal, so convert them "
                f"with .to(...) first."
            )
    check_positions("positions", positions)
    if positions.device != q.device:
        raise ValueError(
            f"positions is on {positions.device} and q on {q.device}; they must be on one device."
        )
    if positions.shape != q.shape[1:2]:
        raise ValueError(
            f"positions has shape {tuple(positions.shape)} and q {q.shape[1]} rows; give one "
            f"position per row."
        )
    if positions.device.type == "cpu" and positions.numel() and not torch.compiler.is_compiling():
        first, last = int(positions.min()), int(positions.max())
        if first < 0 or last >= 2**_POSITION_BITS:
            raise ValueError(
                f"positions go from {first} to {last}; they must lie between 0 and "
                f"{2**_POSITION_BITS - 1}, and since only differences count, may all be shifted."
            )
    scale = check_scale(scale, q.shape[-1])
    if scale == 0:
        raise ValueError("scale is 0, which would remove the bias too; it must not be 0.")
    return scale


def _checked_slopes(slopes: Sequence[float]) -> tuple[float, ...]:
    if not is_listed(slopes):
        raise TypeError(f"slopes is {slopes!r}; it must be a list of numbers, one per head.")
    return tuple(map(float, slopes))


def _check_range(slopes: Sequence[float], scale: float, dtype: torch.dtype) -> None:
    """Refuse slopes over scale that the dtype cannot hold for the largest position."""
    steepest = max(map(abs, slopes), default=0.0)
    if not math.isfinite(steepest):
        raise ValueError("slopes holds a number that is not finite; each slope must be finite.")
    limit = torch.finfo(dtype).max / 2**_POSITION_BITS * _CONSTANT
    if steepest > limit:
        raise ValueError(
            f"scale is {scale:g}; {dtype} holds positions of these slopes for scales of at least "
            f"{abs(scale) * steepest / limit:.3g}, so use that, or bfloat16."
        )
