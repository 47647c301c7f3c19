"""Run an exchange: attend to local rows while parcels travel, forward and backward.

The functions take lists with one entry for each rank that runs in this process: one over
torch.distributed, all of them in one process. All of these ranks do a step before one does the
next.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dilated_core import AttentionOutput, Gradients, empty_partial

from dilated_ring.execution.parcels import (
    KeysAndValues,
    add_,
    add_packed_,
    join,
    message_length,
    pack,
    split,
    zeros_of,
)
from dilated_ring.execution.tasks import Shards, Work, local_tasks, parcel_tasks
from dilated_ring.plan.exchange import Move
from dilated_ring.transport.contract import Pending


def forward(work: Work, q: Shards, k: Shards, v: Shards) -> list[AttentionOutput]:
    """The results of each hosted rank, in the dtype to accumulate in; not differentiable.

    Args:
        work: The plan and the options.
        q: `(B, L, H, D)` for each hosted rank, contiguous.
        k, v: `(B, L, H_kv, D)`, contiguous.
    """
    exchange, ranks = work.exchange, work.transport.hosted
    results = [empty_partial(x.shape, dtype=x.dtype, device=x.device) for x in q]
    held = [_own_parcels(work, rank, *kv) for rank, *kv in zip(ranks, k, v, strict=True)]
    pending = _start_rows(work, 0, k, held)
    for rank, into, *tensors in zip(ranks, results, q, k, v, strict=True):
        for task in local_tasks(work, rank, *tensors):
            task.attend_(work.backend, into)
    for step in range(exchange.num_steps):
        held = _received(work, exchange.moves[step], k, pending)
        pending = _start_rows(work, step + 1, k, held)
        for rank, into, x, parcels in zip(ranks, results, q, held, strict=True):
            for task in parcel_tasks(work, rank, x, parcels):
                task.attend_(work.backend, into)
    return results


def backward(
    work: Work,
    dout: Shards,
    dlse: Sequence[torch.Tensor | None],
    q: Shards,
    k: Shards,
    v: Shards,
    out: Shards,
    lse: Shards,
) -> list[Gradients]:
    """The gradients of q, k and v of each hosted rank, in the dtype to accumulate in.

    k and v travel once more; their gradients come home by `Exchange.returns`.
    """
    exchange, ranks = work.exchange, work.transport.hosted
    wide = lse[0].dtype
    deltas = [(a.to(wide) * b).sum(-1) for a, b in zip(dout, out, strict=True)]
    grads: list[Gradients] = [
        (torch.zeros_like(a, dtype=wide), torch.zeros_like(b, dtype=wide),
         torch.zeros_like(c, dtype=wide))
        for a, b, c in zip(q, k, v, strict=True)
    ]  # fmt: skip
    results = list(zip(dout, out, lse, deltas, dlse, strict=True))
    held = [_own_parcels(work, rank, *kv) for rank, *kv in zip(ranks, k, v, strict=True)]
    pending = _start_rows(work, 0, k, held)
    for rank, into, result, *tensors in zip(ranks, grads, results, q, k, v, strict=True):
        for task in local_tasks(work, rank, *tensors):
            task.differentiate_(work.backend, into, *result)
    # Gradients of parcels that this rank holds in a step, or that come with the next message.
    returning: list[Pending] | None = None
    for step in range(exchange.num_steps):
        held = _received(work, exchange.moves[step], k, pending)
        pending = _start_rows(work, step + 1, k, held)
        sums: list[dict[int, KeysAndValues]] = []
        for rank, into, result, x, parcels in zip(ranks, grads, results, q, held, strict=True):
            mine: dict[int, KeysAndValues] = {}
            for number in parcels:
                mine[number] = zeros_of(exchange, exchange.parcels[number], k[0], wide)
            for task in parcel_tasks(work, rank, x, parcels):
                task.differentiate_(work.backend, (into[0], *mine[task.parcel]), *result)
            sums.append(mine)
        if returning is not None:
            _take_returns(work, exchange.returns[step - 1], k, returning, sums, grads)
        returning = _start_returns(work, step, k, sums)
    if returning is not None:
        nothing: list[dict[int, KeysAndValues]] = [{} for _ in ranks]
        _take_returns(work, exchange.returns[-1], k, returning, nothing, grads)
    return grads


def _own_parcels(
    work: Work, rank: int, k: torch.Tensor, v: torch.Tensor
) -> dict[int, KeysAndValues]:
    exchange = work.exchange
    return {
        number: pack(exchange, parcel, k, v)
        for number, parcel in enumerate(exchange.parcels)
        if parcel.owner == rank
    }


def _start_rows(
    work: Work, step: int, k: Shards, held: list[dict[int, KeysAndValues]]
) -> list[Pending]:
    """Start the messages of a step with the rows held; none after the last step."""
    if step >= work.exchange.num_steps:
        return []
    name = f"step {step + 1} of {work.exchange.num_steps} with rows of k and v"
    return _start(work, work.exchange.moves[step], k, held, k[0].dtype, name)


def _start_returns(
    work: Work, step: int, k: Shards, sums: list[dict[int, KeysAndValues]]
) -> list[Pending]:
    name = f"step {step + 1} of {work.exchange.num_steps} with gradients of k and v"
    dtype = torch.promote_types(k[0].dtype, torch.float32)
    return _start(work, work.exchange.returns[step], k, sums, dtype, name)


def _start(
    work: Work,
    moves: tuple[Move, ...],
    k: Shards,
    held: list[dict[int, KeysAndValues]],
    dtype: torch.dtype,
    name: str,
) -> list[Pending]:
    exchange = work.exchange
    pending: list[Pending] = []
    for rank, x, parcels in zip(work.transport.hosted, k, held, strict=True):
        B, D = x.shape[0], x.shape[3]
        sends = {
            move.destination: join(parcels[n] for n in move.parcels)
            for move in moves
            if move.source == rank
        }
        receives = {
            move.source: x.new_empty(message_length(exchange, move.parcels, B, D), dtype=dtype)
            for move in moves
            if move.destination == rank
        }
        pending.append(work.transport.start(rank, sends, receives, step=name))
    return pending


def _received(
    work: Work, moves: tuple[Move, ...], k: Shards, pending: list[Pending]
) -> list[dict[int, KeysAndValues]]:
    """The parcels that each hosted rank has received in a step, in the order of their numbers."""
    received: list[dict[int, KeysAndValues]] = []
    for rank, x, messages in zip(work.transport.hosted, k, pending, strict=True):
        tensors = messages.wait()
        parcels: dict[int, KeysAndValues] = {}
        for move in moves:
            if move.destination == rank:
                parcels |= split(
                    tensors[move.source], work.exchange, move.parcels, x.shape[0], x.shape[3]
                )
        received.append(dict(sorted(parcels.items())))
    return received


def _take_returns(
    work: Work,
    moves: tuple[Move, ...],
    k: Shards,
    pending: list[Pending],
    sums: list[dict[int, KeysAndValues]],
    grads: list[Gradients],
) -> None:
    """Add received gradients: to sums that travel on, or to the gradients of their owner."""
    exchange = work.exchange
    for rank, x, messages, mine, own in zip(
        work.transport.hosted, k, pending, sums, grads, strict=True
    ):
        tensors = messages.wait()
        for move in moves:  # by source, so that sums are the same in every run
            if move.destination != rank:
                continue
            parts = split(tensors[move.source], exchange, move.parcels, x.shape[0], x.shape[3])
            for number, part in parts.items():
                parcel = exchange.parcels[number]
                if parcel.owner == rank:
                    add_packed_(exchange, parcel, own[1], own[2], part)
                else:
                    add_(mine[number], part)
