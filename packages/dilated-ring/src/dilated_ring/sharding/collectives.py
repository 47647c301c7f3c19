"""Collectives on the shards of a sequence, each the transpose of another for autograd.

They move bytes, so that every dtype travels on every backend, and add in one place, after the
exchange, so that sums have the same bits on gloo and NCCL.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from dilated_ring.sharding.shards import Shards


def cut(full: torch.Tensor, shards: Shards) -> torch.Tensor:
    """This rank's part of a tensor that all ranks hold; its gradient is gathered in backward."""
    return _Cut.apply(full, shards)  # pyright: ignore[reportReturnType]


def gather(local: torch.Tensor, shards: Shards) -> torch.Tensor:
    """The parts of all ranks in global order; in backward the ranks' gradients are added."""
    return _Gather.apply(local, shards)  # pyright: ignore[reportReturnType]


def sum_and_cut(full: torch.Tensor, shards: Shards) -> torch.Tensor:
    """This rank's part of the sum of the ranks' tensors; its gradient is gathered in backward."""
    return _SumAndCut.apply(full, shards)  # pyright: ignore[reportReturnType]


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor as its bytes, in one dimension. Gloo and NCCL know only some dtypes."""
    return x.flatten().view(torch.uint8)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _rows_of(full, shards, shards.ranks.rank).movedim(0, shards.dim).contiguous()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[Any, ...]:
        return _gathered(grads[0], ctx.shards), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _gathered(local, shards)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return sum_and_cut(grads[0], ctx.shards), None


class _SumAndCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: torch.Tensor, shards: Shards) -> torch.Tensor:
        ctx.shards = shards
        return _summed(full, shards)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return gather(grads[0], ctx.shards), None


def _rows_of(full: torch.Tensor, shards: Shards, rank: int) -> torch.Tensor:
    """A copy of the positions of `rank`, with the sequence as the first dimension."""
    rows = full.movedim(shards.dim, 0)
    # The empty slice is all that a rank without positions has.
    return torch.cat([rows[:0], *(rows[slice(*span)] for span in shards.spans[rank])])


def _gathered(local: torch.Tensor, shards: Shards) -> torch.Tensor:
    dim, lengths = shards.dim, shards.lengths
    rows = local.movedim(dim, 0)
    # The collective takes equal sizes. Shards differ by at most two positions.
    mine = rows.new_zeros(max(lengths), *rows.shape[1:])
    mine[: rows.shape[0]] = rows
    everyone = mine.new_empty(len(lengths), *mine.shape)
    if shards.ranks.process_group is None:
        everyone = mine.unsqueeze(0)
    elif mine.numel():
        dist.all_gather_into_tensor(as_bytes(everyone), as_bytes(mine), shards.ranks.process_group)
    full = local.new_empty([*local.shape[:dim], sum(lengths), *local.shape[dim + 1 :]])
    into = full.movedim(dim, 0)
    for part, spans in zip(everyone.unbind(), shards.spans, strict=True):
        begin = 0
        for span in spans:
            into[slice(*span)] = part[begin : begin + span.length]
            begin += span.length
    return full


def _summed(full: torch.Tensor, shards: Shards) -> torch.Tensor:
    dim, lengths, ranks = shards.dim, shards.lengths, shards.ranks
    if ranks.process_group is None:
        return full.clone(memory_format=torch.contiguous_format)
    parts = torch.cat([_rows_of(full, shards, rank) for rank in range(ranks.size)])
    received = parts.new_empty(ranks.size, lengths[ranks.rank], *parts.shape[1:])
    if parts.numel():
        row_bytes = parts[0].numel() * parts.element_size()
        dist.all_to_all_single(
            as_bytes(received),
            as_bytes(parts),
            [lengths[ranks.rank] * row_bytes] * ranks.size,
            [length * row_bytes for length in lengths],
            ranks.process_group,
        )
    # PyTorch adds half precision in float32 and casts once.
    return received.sum(0).movedim(0, dim).contiguous()
