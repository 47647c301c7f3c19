"""Heads for positions: each rank gets some heads of all positions, and gives them back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from dilated_ring.execution.tasks import Shards
from dilated_ring.layout import joined
from dilated_ring.plan.sequences import Spans
from dilated_ring.transport.contract import Pending, Transport
from dilated_ring.transport.faults import reporting_failures

Parts = Sequence[Sequence[slice]]
"""For each tensor, the heads that each rank gets."""


class Places(NamedTuple):
    """Where the positions of ranks lie in a tensor that holds those of all of them, ascending.

    Attributes:
        length: Positions of all ranks together.
        of_rank: For each rank, the slices of its spans.
    """

    length: int
    of_rank: tuple[tuple[slice, ...], ...]


def places(ranks: Spans) -> Places:
    """The places of the spans of these ranks."""
    union = joined([span for spans in ranks for span in spans])
    starts = list(accumulate((span.length for span in union), initial=0))

    def place(start: int, stop: int) -> slice:
        for span, at in zip(union, starts, strict=False):
            if span.start <= start < span.stop:
                return slice(at + start - span.start, at + stop - span.start)
        raise AssertionError("a span lies in the union of all spans")

    of_rank = tuple(tuple(place(*span) for span in spans) for spans in ranks)
    return Places(starts[-1], of_rank)


def to_heads(
    transport: Transport, where: Places, parts: Parts, tensors: Sequence[Shards]
) -> list[tuple[torch.Tensor, ...]]:
    """`(B, L, H, …)` of each hosted rank as `(B, where.length, its heads, …)`; differentiable.

    Backward sends the gradients of all tensors on every rank, zeros where a rank has none, since
    other ranks wait for them.

    Args:
        transport: Between the ranks.
        where: Of `places`.
        parts: For each tensor, the heads that each rank gets.
        tensors: For each tensor, the shards of the hosted ranks.
    """
    return _by_tensor(_Regroup.apply(True, transport, where, parts, *chain(*tensors)), len(parts))


def to_positions(
    transport: Transport, where: Places, parts: Parts, tensors: Sequence[Shards]
) -> list[tuple[torch.Tensor, ...]]:
    """The inverse of `to_heads`; differentiable, as it is."""
    return _by_tensor(_Regroup.apply(False, transport, where, parts, *chain(*tensors)), len(parts))


class _Regroup(torch.autograd.Function):
    """Positions for heads, or heads for positions; the gradient of one is the other."""

    @staticmethod
    def forward(
        ctx: Any,
        is_to_heads: bool,
        transport: Transport,
        where: Places,
        parts: Parts,
        *shards: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.arguments = is_to_heads, transport, where, parts
        gather = _gather_positions if is_to_heads else _gather_heads
        return gather(transport, where, parts, shards)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        is_to_heads, transport, where, parts = ctx.arguments
        gather = _gather_heads if is_to_heads else _gather_positions
        with reporting_failures(transport, transport.hosted[0]):
            return None, None, None, None, *gather(transport, where, parts, grads)


def _gather_positions(
    transport: Transport, where: Places, parts: Parts, shards: Shards
) -> tuple[torch.Tensor, ...]:
    pending: list[Pending] = []
    for number, rank, x in _numbered(transport, shards):
        heads = parts[number]
        width = heads[rank].stop - heads[rank].start
        others = [other for other in range(transport.size) if other != rank]
        sends = {other: x[:, :, heads[other]].contiguous() for other in others}
        receives = {
            other: x.new_empty(x.shape[0], _length(where, other), width, *x.shape[3:])
            for other in others
        }
        step = f"positions for heads, tensor {number + 1} of {len(parts)}"
        pending.append(transport.start(rank, sends, receives, step=step))
    results: list[torch.Tensor] = []
    for (number, rank, x), messages in zip(_numbered(transport, shards), pending, strict=True):
        own = x[:, :, parts[number][rank]]
        y = x.new_empty(x.shape[0], where.length, *own.shape[2:])
        for other, part in {**messages.wait(), rank: own}.items():
            at = 0
            for rows in where.of_rank[other]:
                length = rows.stop - rows.start
                y[:, rows] = part[:, at : at + length]
                at += length
        results.append(y)
    return tuple(results)


def _gather_heads(
    transport: Transport, where: Places, parts: Parts, shards: Shards
) -> tuple[torch.Tensor, ...]:
    pending: list[Pending] = []
    for number, rank, y in _numbered(transport, shards):
        length = _length(where, rank)
        others = [other for other in range(transport.size) if other != rank]
        sends = {other: _rows(y, where, other) for other in others}
        widths = {other: parts[number][other].stop - parts[number][other].start for other in others}
        receives = {
            other: y.new_empty(y.shape[0], length, width, *y.shape[3:])
            for other, width in widths.items()
        }
        step = f"heads for positions, tensor {number + 1} of {len(parts)}"
        pending.append(transport.start(rank, sends, receives, step=step))
    results: list[torch.Tensor] = []
    for (number, rank, y), messages in zip(_numbered(transport, shards), pending, strict=True):
        num_heads = max(part.stop for part in parts[number])
        x = y.new_empty(y.shape[0], _length(where, rank), num_heads, *y.shape[3:])
        for other, part in {**messages.wait(), rank: _rows(y, where, rank)}.items():
            x[:, :, parts[number][other]] = part
        results.append(x)
    return tuple(results)


def _numbered(transport: Transport, shards: Shards) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The number of the tensor, the rank, and its shard, for all tensors and hosted ranks."""
    n = len(transport.hosted)
    for i, x in enumerate(shards):
        yield i // n, transport.hosted[i % n], x


def _by_tensor(
    shards: tuple[torch.Tensor, ...], num_tensors: int
) -> list[tuple[torch.Tensor, ...]]:
    n = len(shards) // num_tensors
    return [shards[i * n : (i + 1) * n] for i in range(num_tensors)]


def _length(where: Places, rank: int) -> int:
    return sum(rows.stop - rows.start for rows in where.of_rank[rank])


def _rows(y: torch.Tensor, where: Places, rank: int) -> torch.Tensor:
    """The positions of a rank, contiguous."""
    parts = [y[:, rows] for rows in where.of_rank[rank]]
    return torch.cat(parts, 1) if parts else y[:, :0].contiguous()
