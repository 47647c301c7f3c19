"""Heads for positions: each rank gets some heads of all positions, and gives them back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from dilated_ring.execution.attend import Shards
from dilated_ring.layout import joined
from dilated_ring.plan.sequences import Spans
from dilated_ring.transport.contract import Pending, Transport
from dilated_ring.transport.faults import reporting_failures


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
    transport: Transport, where: Places, heads: Sequence[slice], shards: Shards
) -> list[torch.Tensor]:
    """`(B, L, H, …)` of each hosted rank as `(B, where.length, its heads, …)`; differentiable."""
    return list(_ToHeads.apply(transport, where, heads, *shards))  # pyright: ignore


def to_positions(
    transport: Transport, where: Places, heads: Sequence[slice], shards: Shards
) -> list[torch.Tensor]:
    """The way back of `to_heads`; differentiable."""
    return list(_ToPositions.apply(transport, where, heads, *shards))  # pyright: ignore


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transport: Transport, where: Places, heads: Sequence[slice], *shards: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.arguments = transport, where, heads
        return _gather_positions(transport, where, heads, shards)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        transport: Transport = ctx.arguments[0]
        with reporting_failures(transport, transport.hosted[0]):
            return None, None, None, *_gather_heads(*ctx.arguments, shards=grads)  # pyright: ignore


class _ToPositions(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, transport: Transport, where: Places, heads: Sequence[slice], *shards: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.arguments = transport, where, heads
        return _gather_heads(transport, where, heads, shards)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        transport: Transport = ctx.arguments[0]
        with reporting_failures(transport, transport.hosted[0]):
            return None, None, None, *_gather_positions(*ctx.arguments, shards=grads)  # pyright: ignore


def _gather_positions(
    transport: Transport, where: Places, heads: Sequence[slice], shards: Shards
) -> tuple[torch.Tensor, ...]:
    results: list[torch.Tensor] = []
    pending: list[Pending] = []
    for rank, x in zip(transport.hosted, shards, strict=True):
        mine = heads[rank]
        width = mine.stop - mine.start
        sends = {
            other: x[:, :, heads[other]].contiguous()
            for other in range(transport.size)
            if other != rank
        }
        receives = {
            other: x.new_empty(x.shape[0], _length(where, other), width, *x.shape[3:])
            for other in range(transport.size)
            if other != rank
        }
        pending.append(transport.start(rank, sends, receives, step="positions for heads"))
        results.append(x.new_empty(x.shape[0], where.length, width, *x.shape[3:]))
    for rank, x, y, messages in zip(transport.hosted, shards, results, pending, strict=True):
        parts = {**messages.wait(), rank: x[:, :, heads[rank]]}
        for other, part in parts.items():
            at = 0
            for rows in where.of_rank[other]:
                length = rows.stop - rows.start
                y[:, rows] = part[:, at : at + length]
                at += length
    return tuple(results)


def _gather_heads(
    transport: Transport, where: Places, heads: Sequence[slice], shards: Shards
) -> tuple[torch.Tensor, ...]:
    results: list[torch.Tensor] = []
    pending: list[Pending] = []
    num_heads = max(part.stop for part in heads)
    for rank, y in zip(transport.hosted, shards, strict=True):
        length = _length(where, rank)
        sends = {other: _rows(y, where, other) for other in range(transport.size) if other != rank}
        receives = {
            other: y.new_empty(
                y.shape[0], length, heads[other].stop - heads[other].start, *y.shape[3:]
            )
            for other in range(transport.size)
            if other != rank
        }
        pending.append(transport.start(rank, sends, receives, step="heads for positions"))
        results.append(y.new_empty(y.shape[0], length, num_heads, *y.shape[3:]))
    for rank, y, x, messages in zip(transport.hosted, shards, results, pending, strict=True):
        parts = {**messages.wait(), rank: _rows(y, where, rank)}
        for other, part in parts.items():
            x[:, :, heads[other]] = part
    return tuple(results)


def _length(where: Places, rank: int) -> int:
    return sum(rows.stop - rows.start for rows in where.of_rank[rank])


def _rows(y: torch.Tensor, where: Places, rank: int) -> torch.Tensor:
    """The positions of a rank, contiguous."""
    parts = [y[:, rows] for rows in where.of_rank[rank]]
    return torch.cat(parts, 1) if parts else y[:, :0].contiguous()
