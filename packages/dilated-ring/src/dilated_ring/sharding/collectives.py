"""Gather shards and add over ranks, each the transpose of the other for autograd.

The exchange moves bytes, so that every dtype travels on every backend. Sums are taken after it, in
one order, so that they have the same bits on gloo and NCCL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from dilated_ring.sharding.shards import Shards, reporting


def cut(full: torch.Tensor, shards: Shards) -> torch.Tensor:
    """This rank's part of a tensor that all ranks hold; its gradient is gathered in backward."""
    return _Cut.apply(full, shards)  # pyright: ignore[reportReturnType]


def gather(local: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The parts of all ranks in global order; in backward the ranks' gradients are added."""
    return _Gather.apply(local, shards)  # pyright: ignore[reportReturnType]


def sum_and_cut(full: torch.Tensor, shards: Shards) -> torch.Tensor:
    """This rank's part of the sum of the ranks' tensors; its gradient is gathered in backward."""
    return _SumAndCut.apply(full, shards)  # pyright: ignore[reportReturnType]


def exchange(
    shards: Shards,
    sends: Mapping[int, torch.Tensor],
    receives: Mapping[int, torch.Tensor],
    *,
    step: str,
) -> None:
    """Send and receive contiguous tensors of any dtype, by rank; fill `receives`."""
    if shards.transport is not None:
        incoming = {peer: _as_bytes(x) for peer, x in receives.items()}
        outgoing = {peer: _as_bytes(x) for peer, x in sends.items()}
        shards.transport.start(shards.rank, outgoing, incoming, step=step).wait()


def _as_bytes(x: torch.Tensor) -> torch.Tensor:
    # Gloo and NCCL know only some dtypes.
    return x.flatten().view(torch.uint8)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _rows_of(full, shards, shards.rank).movedim(0, shards.dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[Any, ...]:
        with reporting(ctx.shards.transport):
            return _gathered(grads[0], ctx.shards), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _gathered(local, shards)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        with reporting(ctx.shards.transport):
            return sum_and_cut(grads[0], ctx.shards), None


class _SumAndCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _summed(full, shards)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        with reporting(ctx.shards.transport):
            return gather(grads[0], ctx.shards), None


def _rows_of(full: torch.Tensor, shards: Shards, rank: int) -> torch.Tensor:
    """A copy of the positions of `rank`, with the sequence as the first dimension."""
    rows = full.movedim(shards.dim, 0)
    # The empty slice is all that a rank without positions has.
    return torch.cat([rows[:0], *(rows[slice(*span)] for span in shards.spans[rank])])


def _gathered(local: torch.Tensor, shards: Shards) -> torch.Tensor:
    dim, lengths = shards.dim, shards.lengths
    mine = local.movedim(dim, 0).contiguous()
    parts = {
        rank: mine if rank == shards.rank else mine.new_empty(length, *mine.shape[1:])
        for rank, length in enumerate(lengths)
    }
    others = {rank: part for rank, part in parts.items() if rank != shards.rank}
    exchange(shards, dict.fromkeys(others, mine), others, step="gather of shards")
    full = local.new_empty([*local.shape[:dim], sum(lengths), *local.shape[dim + 1 :]])
    into = full.movedim(dim, 0)
    for rank, part in parts.items():
        begin = 0
        for span in shards.spans[rank]:
            into[slice(*span)] = part[begin : begin + span.length]
            begin += span.length
    return full


def _summed(full: torch.Tensor, shards: Shards) -> torch.Tensor:
    parts = [_rows_of(full, shards, rank) for rank in range(len(shards.spans))]
    mine = parts[shards.rank]
    received = mine.new_empty(len(parts), *mine.shape)
    received[shards.rank] = mine
    others = {rank: part for rank, part in enumerate(parts) if rank != shards.rank}
    exchange(shards, others, {rank: received[rank] for rank in others}, step="sum of gradients")
    # In the order of the ranks. PyTorch adds half precision in float32 and casts once.
    return received.sum(0).movedim(0, shards.dim).contiguous()
