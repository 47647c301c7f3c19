"""Dropout by position: which probabilities are dropped follows from the seed and the positions.

A probability belongs to a branch, a batch row, a head, a query and a key. These and the seed decide
whether it is dropped; the order, the sizes and the place of the computation do not. So one device
and many, a whole call and one with little workspace, all heads and some of them, and forward and
backward drop the same.

Each query, key, head and branch has a random number of 32 bits. Of a pair, the sum of its numbers
is mixed once more, by the finaliser of MurmurHash3 with the multipliers of "lowbias32" (C.
Wellons, Hash Prospector), and compared with the probability of dropping. A probability costs about
ten integer operations, less than half as much as a draw of PyTorch's generator for CPUs.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch

_LOW = 2**32 - 1
_MULTIPLIERS = 0x7FEB352D, 0x846CA68B
_SHIFTS = 16, 15

# Numbers mixed at once: few enough for a CPU's cache, many enough for a GPU.
_MIXED_AT_ONCE = {"cpu": 2**17}
_MIXED_ELSEWHERE = 2**22


class DropoutRows(NamedTuple):
    """The random numbers of rows, int32; the number of a probability is the sum of its two rows'.

    Attributes:
        queries: `(B, M, H)` for a backend; `(B, M)` for `attend_` and `differentiate_`, which add
            the numbers of heads and branches.
        keys: `(B, N, H_kv)` for a backend; `(B, N)`, or the same with heads, for `attend_` and
            `differentiate_`.
        heads: `(H,)`, for `attend_` and `differentiate_`.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    heads: torch.Tensor | None = None

    def of_heads(self) -> DropoutRows:
        """The same with queries `(B, M, H)`, to which the numbers of their heads are added."""
        if self.heads is None:
            return self
        return DropoutRows(self.queries.unsqueeze(-1) + self.heads, self.keys)


def dropout_rows(seed: int, q: torch.Tensor, *, first: int = 0, first_head: int = 0) -> DropoutRows:
    """The numbers of all positions and heads of a call: `(B, S)`, `(B, S)` and `(H,)`.

    Args:
        seed: Of the call.
        q: `(B, S, H, …)`, of which only shape and device are read.
        first: Number of its first position.
        first_head: Number of its first head.
    """
    B, S, H = q.shape[:3]
    return DropoutRows(
        query_numbers(seed, B, first, S, q.device),
        key_numbers(seed, B, first, S, q.device),
        head_numbers(seed, first_head, H, q.device),
    )


def query_numbers(
    seed: int, batch_size: int, first: int, length: int, device: torch.device
) -> torch.Tensor:
    """The numbers `(B, L)` of the queries at positions from `first` on."""
    return _position_numbers(seed + 1, batch_size, first, length, device)


def key_numbers(
    seed: int, batch_size: int, first: int, length: int, device: torch.device
) -> torch.Tensor:
    """The numbers `(B, L)` of the keys at positions from `first` on."""
    return _position_numbers(seed + 2, batch_size, first, length, device)


def head_numbers(seed: int, first: int, num_heads: int, device: torch.device) -> torch.Tensor:
    """The numbers `(H,)` of the heads from `first` on."""
    return _position_numbers(seed + 3, 1, first, num_heads, device)[0]


def branch_number(branch: int) -> int:
    """The number of a branch, which its queries have besides those of position and head."""
    return _signed(_mixed(branch))


def dropped(queries: torch.Tensor, keys: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """Which probabilities are dropped: bool `(…, M, N)` from numbers `(…, M)` and `(…, N)`."""
    sizes = queries.unsqueeze(-1).shape, keys.unsqueeze(-2).shape
    shape = cast("tuple[int, ...]", torch.broadcast_shapes(*sizes))  # pyright: ignore
    result = torch.empty(shape, dtype=torch.bool, device=queries.device)
    if result.numel() == 0:
        return result
    # int32 has the range of the numbers shifted by half of it.
    limit = round(dropout_p * 2**32) - 2**31
    at_once = _MIXED_AT_ONCE.get(queries.device.type, _MIXED_ELSEWHERE)
    step = max(1, at_once * queries.shape[-1] // result.numel())
    for first in range(0, queries.shape[-1], step):
        rows = slice(first, first + step)
        x = queries[..., rows].unsqueeze(-1) + keys.unsqueeze(-2)
        shifted = torch.empty_like(x)
        for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=True):
            # A shift of int32 copies the sign downwards; the mask removes the copies.
            torch.bitwise_right_shift(x, shift, out=shifted)
            x.bitwise_xor_(shifted.bitwise_and_(2 ** (32 - shift) - 1))
            x.mul_(_signed(multiplier))
        result[..., rows, :] = x < limit
    return result


def dropped_bytes(num_scores: int, num_rows: int) -> int:
    """Bytes that `dropped` allocates at most on a CPU, for so many scores of so many queries."""
    at_once = max(_MIXED_AT_ONCE["cpu"], num_scores // max(1, num_rows))
    return num_scores + 9 * min(num_scores, at_once)


def _position_numbers(
    seed: int, batch_size: int, first: int, length: int, device: torch.device
) -> torch.Tensor:
    base = _mixed(_mixed(seed & _LOW) + (seed >> 32))
    rows = torch.tensor([_mixed(base + b) for b in range(batch_size)], device=device)
    positions = torch.arange(first, first + length, device=device)
    x = positions.add(rows[:, None]).bitwise_and_(_LOW)
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=True):
        x.bitwise_xor_(x >> shift)
        x.mul_(multiplier).bitwise_and_(_LOW)
    x.bitwise_xor_(x >> _SHIFTS[0])
    return x.sub_(2**31).to(torch.int32)


def _mixed(number: int) -> int:
    """A number from 0 to 2³² − 1 whose every bit depends on every bit of the low half of this."""
    number &= _LOW
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=True):
        number ^= number >> shift
        number = number * multiplier & _LOW
    return number ^ number >> _SHIFTS[0]


def _signed(number: int) -> int:
    """32 bits as an int32."""
    return number - 2**32 if number >= 2**31 else number
