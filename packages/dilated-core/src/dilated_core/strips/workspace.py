"""Pieces: parts of a call that run one after another, so that their workspace is bounded.

Beyond inputs and results, a piece needs the result of one problem, the memory that the backend
allocates for this problem, and in half precision a float32 accumulator. Heads and batch rows do
not interact. Neither do positions on two sides of a place where all branches end a segment. A call
is cut along these until its workspace fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch

from dilated_core.backends.contract import (
    AttentionBackend,
    AttentionInputs,
    BoundedWorkspaceBackend,
)
from dilated_core.merge import accumulation_dtype
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.strips.plan import Problem, Span, plan_problems

HALF_DTYPES = (torch.bfloat16, torch.float16)

# Half-precision calls that need no more than this are not cut: more calls would cost more.
_UNCUT_BYTES = 2**23


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a `(B, S, H, D)` call.

    Attributes:
        batches, positions, heads, kv_heads: What it covers.
        is_whole: It covers everything.
        problems: Its problems, which count batches, positions and heads from its first ones.
    """

    batches: slice
    positions: slice
    heads: slice
    kv_heads: slice
    is_whole: bool
    problems: tuple[Problem, ...]

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """Its part of a `(B, S, H, …)` tensor, a view."""
        return x if self.is_whole else x[self.batches, self.positions, self.heads]

    def kv_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Its part of a `(B, S, H_kv, …)` tensor, a view."""
        return x if self.is_whole else x[self.batches, self.positions, self.kv_heads]


class Geometry(NamedTuple):
    """What the pieces of a call depend on.

    Attributes:
        pattern: The branches.
        inputs: Heads, head_dim, dtype and options. `seq_len` is S of the whole sequence.
            `max_workspace_bytes` is the memory that forward may take beyond inputs and results;
            None: no limit in float32 and float64, in half precision about the size of the output.
        batch_size: B.
        span: The positions at hand; each branch ends a segment where they begin and end.
        head_range: (first, total) as for `plan_problems`.
        is_causal: Whether queries see only the past.
        is_batch_dense: As for `plan_problems`.
        backend: The backend if there is a limit, which counts what it allocates; else None.
        num_threads: Of PyTorch, which backends' memory may depend on; 0 without a limit.
    """

    pattern: DilatedPattern
    inputs: AttentionInputs
    batch_size: int
    span: Span
    head_range: tuple[int, int]
    is_causal: bool
    is_batch_dense: bool
    backend: AttentionBackend | None
    num_threads: int


class _Size(NamedTuple):
    """Batch rows, positions and heads of k and v that a piece covers at most."""

    batches: int
    positions: int
    kv_heads: int


@lru_cache(maxsize=256)
def plan_pieces(geometry: Geometry) -> tuple[Piece, ...]:
    """Cut a call into the fewest pieces whose workspace fits; into the smallest if none fits."""
    inputs = geometry.inputs
    whole = _whole(geometry)
    size_in_bytes = math.prod(whole) * _group(inputs) * inputs.head_dim * inputs.dtype.itemsize
    if size_in_bytes == 0:
        return ()
    limit = inputs.max_workspace_bytes
    if limit is None and inputs.dtype in HALF_DTYPES:
        limit = max(_UNCUT_BYTES, size_in_bytes)
    pieces: tuple[Piece, ...] = ()
    for size in _sizes(geometry):
        pieces = _cut(geometry, size)
        if limit is None:
            break
        room = limit - _fixed_bytes(geometry, size)
        if all(_problem_bytes(geometry, p, 1) <= room for piece in pieces for p in piece.problems):
            return tuple(_with_split_problems(geometry, piece, room) for piece in pieces)
    return pieces


@lru_cache(maxsize=256)
def smallest_workspace(geometry: Geometry) -> int:
    """The smallest `max_workspace_bytes` that can be kept."""
    whole = _whole(geometry)
    if 0 in whole:
        return 0
    return min(
        _fixed_bytes(geometry, size)
        + max(
            (_problem_bytes(geometry, p, 1) for piece in pieces for p in piece.problems), default=0
        )
        for size in _sizes(geometry)
        for pieces in [_cut(geometry, size)]
    )


def _whole(geometry: Geometry) -> _Size:
    inputs = geometry.inputs
    kv_heads = inputs.num_kv_heads or inputs.num_heads
    return _Size(geometry.batch_size, geometry.span.length, kv_heads)


def _group(inputs: AttentionInputs) -> int:
    return inputs.num_heads // (inputs.num_kv_heads or inputs.num_heads or 1)


def _fixed_bytes(geometry: Geometry, size: _Size) -> int:
    """Bytes that a piece takes however its problems are split."""
    inputs, D = geometry.inputs, geometry.inputs.head_dim
    rows = math.prod(size)
    masked = 2 * rows * D * inputs.dtype.itemsize if inputs.has_key_padding_mask else 0
    if size == _whole(geometry) and inputs.dtype not in HALF_DTYPES:
        # In one piece and without conversion, the result itself is what is accumulated in.
        return masked
    wide = accumulation_dtype(inputs.dtype).itemsize
    return masked + rows * _group(inputs) * wide * (D + 1)


def _problem_bytes(geometry: Geometry, problem: Problem, count: int) -> int:
    """Bytes for the result of `count` of the problem's segments, merged into the accumulator."""
    inputs, queries = geometry.inputs, problem.queries
    wide = accumulation_dtype(inputs.dtype).itemsize
    # The backend's out, its conversion to the accumulator's dtype, and three numbers per row.
    row = inputs.head_dim * (inputs.dtype.itemsize + wide * (inputs.dtype in HALF_DTYPES))
    needed = count * queries.num_rows * queries.num_heads * (row + 3 * wide)
    return needed + _backend_bytes(geometry, problem, count)


def _backend_bytes(geometry: Geometry, problem: Problem, count: int) -> int:
    backend, queries, keys = geometry.backend, problem.queries, problem.keys
    if not isinstance(backend, BoundedWorkspaceBackend):
        return 0
    inputs = geometry.inputs._replace(num_heads=queries.num_heads, num_kv_heads=keys.num_heads)
    return backend.workspace_bytes(inputs, count, queries.num_rows, keys.num_rows)


def _sizes(geometry: Geometry) -> Iterator[_Size]:
    """Sizes of pieces, from everything to as little as possible."""
    size = _whole(geometry)
    yield size
    # First heads, which keeps the views long; last positions, where all branches end a segment.
    while size.kv_heads > 1:
        size = size._replace(kv_heads=-(-size.kv_heads // 2))
        yield size
    while size.batches > 1:
        size = size._replace(batches=-(-size.batches // 2))
        yield size
    S = geometry.inputs.seq_len or 0
    common = math.lcm(*(min(w, S) for w in geometry.pattern.segment_lengths))
    while size.positions > common:
        size = size._replace(positions=common * (-(-size.positions // common) // 2))
        yield size


def _cut(geometry: Geometry, size: _Size) -> tuple[Piece, ...]:
    B, length, K = _whole(geometry)
    start = geometry.span.start
    group = _group(geometry.inputs)
    first_head, total_heads = geometry.head_range
    return tuple(
        Piece(
            batches=slice(b, b_end),
            positions=slice(s, s_end),
            heads=slice(h * group, h_end * group),
            kv_heads=slice(h, h_end),
            is_whole=size == (B, length, K),
            problems=plan_problems(
                geometry.pattern,
                queries=Span(start + s, start + s_end),
                keys=Span(start + s, start + s_end),
                seq_len=geometry.inputs.seq_len or 0,
                num_heads=(h_end - h) * group,
                num_kv_heads=h_end - h,
                head_range=(first_head + h * group, total_heads),
                batch_size=b_end - b,
                is_causal=geometry.is_causal,
                # Positions are only cut where there is one batch row.
                is_batch_dense=geometry.is_batch_dense,
            ),
        )
        for b, b_end in _spans(B, size.batches)
        for s, s_end in _spans(length, size.positions)
        for h, h_end in _spans(K, size.kv_heads)
    )


def _spans(length: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _with_split_problems(geometry: Geometry, piece: Piece, room: int) -> Piece:
    """The piece with each problem cut into the largest parts that fit."""
    problems: list[Problem] = []
    everything = math.prod(
        part.stop - part.start for part in (piece.batches, piece.positions, piece.heads)
    )
    is_in_place = piece.is_whole and geometry.inputs.dtype not in HALF_DTYPES
    for problem in piece.problems:
        total = problem.queries.num_problems
        becomes_result = not problems and is_in_place and problem.queries.num_elements == everything
        if becomes_result and _backend_bytes(geometry, problem, total) <= room:
            problems.append(problem)
            continue
        fits, too_many = 1, total + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if _problem_bytes(geometry, problem, middle) <= room:
                fits = middle
            else:
                too_many = middle
        problems.extend(problem.split(fits))
    return Piece(
        piece.batches,
        piece.positions,
        piece.heads,
        piece.kv_heads,
        piece.is_whole,
        tuple(problems),
    )
