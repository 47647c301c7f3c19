"""Pieces: parts of a call that are done one after another, so that their workspace is bounded.

What attention needs beyond its inputs and results is, for the part of the sequence at hand, the
result of one strip and (in half precision) a float32 accumulator. Heads and batch rows do not
interact, nor do positions on two sides of a place where all branches end a segment; so a call can
be cut there, and is, until its workspace fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from dilated_core.pattern.branches import DilatedPattern
from dilated_core.strips.plan import plan_strips
from dilated_core.strips.view import Strip

HALF_DTYPES = (torch.bfloat16, torch.float16)

# Half-precision calls that need no more than this are not cut: more calls would cost more.
_UNCUT_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a `(B, S, H, D)` call.

    Attributes:
        batches, positions, heads, kv_heads: What it covers.
        is_whole: It covers everything.
        strips: Its strips, which count batches, positions and heads from its first ones.
    """

    batches: slice
    positions: slice
    heads: slice
    kv_heads: slice
    is_whole: bool
    strips: tuple[Strip, ...]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Its part of a `(B, S, H, …)` tensor, a view."""
        return x if self.is_whole else x[self.batches, self.positions, self.heads]

    def kv_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Its part of a `(B, S, H_kv, …)` tensor, a view."""
        return x if self.is_whole else x[self.batches, self.positions, self.kv_heads]


@lru_cache(maxsize=256)
def plan_pieces(
    pattern: DilatedPattern,
    shape: tuple[int, int, int, int],
    num_kv_heads: int,
    dtype: torch.dtype,
    *,
    is_batch_dense: bool,
    max_workspace_bytes: int | None,
) -> tuple[Piece, ...]:
    """Cut a call into the fewest pieces whose workspace fits, or nearly if none does.

    Args:
        pattern: The branches.
        shape: B, S, H, D.
        num_kv_heads: H_kv.
        dtype: Of q.
        is_batch_dense: See `plan_strips`.
        max_workspace_bytes: Memory that the forward pass may take beyond inputs and results. None:
            no limit in float32 and float64; in half precision about the size of the output.

    Returns:
        Pieces that cover every position and head once.
    """
    if 0 in shape:
        return ()
    limit = max_workspace_bytes
    if limit is None and dtype in HALF_DTYPES:
        limit = max(_UNCUT_BYTES, math.prod(shape) * dtype.itemsize)
    pieces: tuple[Piece, ...] = ()
    for sizes in _sizes(pattern, shape, num_kv_heads):
        pieces = _cut(pattern, shape, num_kv_heads, sizes, is_batch_dense)
        if limit is None:
            break
        accumulator, problem, row = _needs(pieces, sizes, shape, num_kv_heads, dtype)
        rows = (limit - accumulator) // row
        if problem <= rows:
            return tuple(_split_strips(piece, rows, accumulator == 0) for piece in pieces)
    return pieces


@lru_cache(maxsize=256)
def smallest_workspace(
    pattern: DilatedPattern,
    shape: tuple[int, int, int, int],
    num_kv_heads: int,
    dtype: torch.dtype,
) -> int:
    """The smallest `max_workspace_bytes` that can be kept; arguments as in `plan_pieces`."""
    if 0 in shape:
        return 0
    smallest = math.inf
    for sizes in _sizes(pattern, shape, num_kv_heads):
        pieces = _cut(pattern, shape, num_kv_heads, sizes, is_batch_dense=False)
        accumulator, problem, row = _needs(pieces, sizes, shape, num_kv_heads, dtype)
        smallest = min(smallest, accumulator + problem * row)
    return int(smallest)


def _needs(
    pieces: tuple[Piece, ...],
    sizes: tuple[int, int, int],
    shape: tuple[int, int, int, int],
    num_kv_heads: int,
    dtype: torch.dtype,
) -> tuple[int, int, int]:
    """Bytes of a piece's accumulator, rows of its largest problem, bytes for each such row."""
    _, _, H, D = shape
    is_half = dtype in HALF_DTYPES
    # A strip's result, its conversion to the dtype of the accumulator, three numbers per row.
    row = D * (dtype.itemsize + 4 * is_half) + 12
    problem = max((s.num_rows * s.num_heads for p in pieces for s in p.strips), default=1)
    if pieces[0].is_whole and not is_half:
        # In one piece and without conversion, the result itself is what strips accumulate in.
        return 0, problem, row
    B, S, kv_heads = sizes
    return B * S * kv_heads * (H // num_kv_heads) * (D * max(dtype.itemsize, 4) + 4), problem, row


def _sizes(
    pattern: DilatedPattern, shape: tuple[int, int, int, int], num_kv_heads: int
) -> Iterator[tuple[int, int, int]]:
    """Batches, positions and kv heads of a piece, from everything to as little as possible."""
    B, S, _, _ = shape
    sizes = B, S, num_kv_heads
    yield sizes
    # First heads, which keeps the strips long; last positions, where all branches end a segment.
    while sizes[2] > 1:
        sizes = B, S, -(-sizes[2] // 2)
        yield sizes
    while sizes[0] > 1:
        sizes = -(-sizes[0] // 2), S, 1
        yield sizes
    common = math.lcm(*(min(w, S) for w in pattern.segment_lengths))
    while sizes[1] > common:
        sizes = 1, common * (-(-sizes[1] // common) // 2), 1
        yield sizes


def _cut(
    pattern: DilatedPattern,
    shape: tuple[int, int, int, int],
    num_kv_heads: int,
    sizes: tuple[int, int, int],
    is_batch_dense: bool,
) -> tuple[Piece, ...]:
    B, S, H, _ = shape
    group = H // num_kv_heads
    is_whole = sizes == (B, S, num_kv_heads)
    return tuple(
        Piece(
            batches=slice(b, b_end),
            positions=slice(s, s_end),
            heads=slice(h * group, h_end * group),
            kv_heads=slice(h, h_end),
            is_whole=is_whole,
            strips=plan_strips(
                pattern,
                b_end - b,
                s_end - s,
                H,
                num_kv_heads=num_kv_heads,
                heads=(h * group, h_end * group),
                clip_length=S,
                # Positions are only cut where there is one batch row.
                is_batch_dense=is_batch_dense,
            ),
        )
        for b, b_end in _spans(B, sizes[0])
        for s, s_end in _spans(S, sizes[1])
        for h, h_end in _spans(num_kv_heads, sizes[2])
    )


def _spans(length: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _split_strips(piece: Piece, max_rows: int, in_place: bool) -> Piece:
    strips: list[Strip] = []
    everything = math.prod(
        part.stop - part.start for part in (piece.batches, piece.positions, piece.heads)
    )
    for strip in piece.strips:
        if in_place and not strips and strip.num_elements == everything:
            # Its result becomes the result that the others are folded into.
            strips.append(strip)
        else:
            strips.extend(strip.split(max_rows))
    return replace(piece, strips=tuple(strips))
