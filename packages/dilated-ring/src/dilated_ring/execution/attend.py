"""Run an exchange: attend to local rows while parcels travel, forward and backward.

The functions take lists with one entry for each rank that runs in this process: one over
torch.distributed, all of them in one process. All of these ranks do a step before one does the
next.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from dilated_core import (
    AttentionBackend,
    AttentionOptions,
    AttentionOutput,
    Gradients,
    Problem,
    Span,
    attend_,
    differentiate_,
    empty_partial,
    plan_problems,
)
from dilated_core.dropout import DropoutRows, head_numbers, key_numbers, query_numbers

from dilated_ring.execution.parcels import (
    KeysAndValues,
    add_,
    add_packed_,
    join,
    message_length,
    pack,
    pack_rows,
    split,
    zeros_of,
)
from dilated_ring.plan.exchange import Exchange, Move
from dilated_ring.plan.parcels import parcel_problems
from dilated_ring.plan.parts import in_parts
from dilated_ring.plan.sequences import CutSequence, Piece
from dilated_ring.plan.tiles import cut_into_tiles, in_order, may_meet
from dilated_ring.transport.contract import Pending, Transport


@dataclass(frozen=True)
class Work:
    """What determines a call on all ranks.

    Attributes:
        exchange: The plan.
        options: Scale and dropout; causality is that of the exchange.
        backend: Runs every problem, forward and backward.
        transport: Carries the parcels.
        hidden: `(B, S)`, the key padding mask over the positions of all ranks, or None.
        tile_size: Positions of a tile, if this rank works in tiles along a Hilbert curve; or None.
    """

    exchange: Exchange
    options: AttentionOptions
    backend: AttentionBackend
    transport: Transport
    hidden: torch.Tensor | None
    tile_size: int | None = None


Shards = Sequence[torch.Tensor]
"""A tensor of each hosted rank."""


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
        for task in _local_tasks(work, rank, *tensors):
            attend_(task.rows_of(into), task.problems, *task.tensors, task.options,
                    backend=work.backend)  # fmt: skip
    for step in range(exchange.num_steps):
        held = _received(work, exchange.moves[step], k, pending)
        pending = _start_rows(work, step + 1, k, held)
        for rank, into, x, parcels in zip(ranks, results, q, held, strict=True):
            for task in _parcel_tasks(work, rank, x, parcels):
                attend_(task.rows_of(into), task.problems, *task.tensors, task.options,
                        backend=work.backend)  # fmt: skip
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
        for task in _local_tasks(work, rank, *tensors):
            _differentiate(work, task, result, (task.queries(into[0]), *task.keys(into[1:])))
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
            for task in _parcel_tasks(work, rank, x, parcels):
                dk, dv = mine[task.parcel]
                _differentiate(work, task, result, (task.queries(into[0]), dk, dv))
            sums.append(mine)
        if returning is not None:
            _take_returns(work, exchange.returns[step - 1], k, returning, sums, grads)
        returning = _start_returns(work, step, k, sums)
    if returning is not None:
        nothing: list[dict[int, KeysAndValues]] = [{} for _ in ranks]
        _take_returns(work, exchange.returns[-1], k, returning, nothing, grads)
    return grads


class _Task(NamedTuple):
    """Problems of one piece of queries with one tensor of keys."""

    problems: tuple[Problem, ...]
    piece: Piece
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: AttentionOptions
    key_rows: slice = slice(None)
    parcel: int = -1

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, self.piece.rows]

    def keys(self, tensors: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(x[:, self.key_rows] for x in tensors)

    def rows_of(self, into: AttentionOutput) -> AttentionOutput:
        return AttentionOutput(self.queries(into.out), self.queries(into.lse))


def _local_tasks(
    work: Work, rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterable[_Task]:
    """Queries of this rank with the keys of this rank."""
    exchange = work.exchange
    for sequence in exchange.sequences:
        pieces = cut_into_tiles(sequence.pieces[rank], work.tile_size)
        for queries, keys in in_order(pieces, pieces, work.tile_size):
            if not may_meet(
                exchange.pattern, queries.span, keys.span, is_causal=exchange.is_causal
            ):
                continue
            is_whole = queries.rows == keys.rows == slice(0, q.shape[1])
            problems = plan_problems(
                exchange.pattern,
                queries=queries.span,
                keys=keys.span,
                seq_len=sequence.seq_len,
                num_heads=exchange.heads.num_heads,
                num_kv_heads=exchange.heads.num_kv_heads,
                head_range=exchange.heads.head_range,
                batch_size=q.shape[0],
                is_causal=exchange.is_causal,
                is_batch_dense=is_whole,
            )
            if not problems:
                continue
            hidden = work.hidden
            if hidden is not None:
                begin = sequence.start + keys.span.start
                hidden = hidden[:, begin : begin + keys.span.length]
            numbers = _key_numbers(work, sequence, keys.span, q)
            yield _Task(
                in_parts(problems, q.shape[:3].numel()),
                queries,
                (q[:, queries.rows], k[:, keys.rows], v[:, keys.rows]),
                _options(work, sequence, queries, q, hidden, numbers),
                key_rows=keys.rows,
            )


def _parcel_tasks(
    work: Work, rank: int, q: torch.Tensor, parcels: Mapping[int, KeysAndValues]
) -> Iterable[_Task]:
    """Queries of this rank with the keys of parcels of other ranks."""
    exchange = work.exchange
    by_sequence = groupby(parcels, key=lambda number: exchange.parcels[number].sequence)
    for sequence_number, numbers in by_sequence:
        sequence = exchange.sequences[sequence_number]
        pieces = cut_into_tiles(sequence.pieces[rank], work.tile_size)
        for number, queries in in_order(tuple(numbers), pieces, work.tile_size):
            parcel = exchange.parcels[number]
            problems = parcel_problems(
                exchange.pattern, parcel.branch, sequence.seq_len, queries.span, parcel.positions,
                exchange.heads, q.shape[0], exchange.is_causal,
            )  # fmt: skip
            if not problems:
                continue
            hidden = work.hidden
            if hidden is not None:
                H_kv = exchange.heads.num_kv_heads
                hidden = hidden.unsqueeze(-1).expand(-1, -1, H_kv)
                hidden = pack_rows(exchange, parcel, hidden, at=sequence.start)
            numbers = _key_numbers(work, sequence, parcel.positions, q)
            if numbers is not None:
                numbers = numbers.unsqueeze(-1).expand(-1, -1, exchange.heads.num_kv_heads)
                numbers = pack_rows(exchange, parcel, numbers, at=-parcel.positions.start)
            yield _Task(
                in_parts(problems, q.shape[:3].numel()), queries,
                (q[:, queries.rows], *parcels[number]),
                _options(work, sequence, queries, q, hidden, numbers), parcel=number,
            )  # fmt: skip


def _key_numbers(
    work: Work, sequence: CutSequence, positions: Span, q: torch.Tensor
) -> torch.Tensor | None:
    """The numbers `(B, N)` by which keys at these positions are dropped; None without dropout."""
    if not work.options.dropout_p:
        return None
    first = sequence.start + positions.start
    return key_numbers(work.options.dropout_seed, q.shape[0], first, positions.length, q.device)


def _options(
    work: Work,
    sequence: CutSequence,
    queries: Piece,
    q: torch.Tensor,
    hidden: torch.Tensor | None,
    dropout_keys: torch.Tensor | None,
) -> AttentionOptions:
    """The options of a task. What it drops depends on the positions among those of all ranks."""
    rows = None
    if dropout_keys is not None:
        seed, (first_head, _) = work.options.dropout_seed, work.exchange.heads.head_range
        first = sequence.start + queries.span.start
        rows = DropoutRows(
            query_numbers(seed, q.shape[0], first, queries.span.length, q.device),
            dropout_keys,
            head_numbers(seed, first_head, q.shape[2], q.device),
        )
    return work.options._replace(key_padding_mask=hidden, dropout_rows=rows)


def _differentiate(
    work: Work,
    task: _Task,
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    into: tuple[torch.Tensor, ...],
) -> None:
    dout, out, lse, delta, dlse = result
    rows = task.queries
    dq, dk, dv = into
    differentiate_(
        (dq, dk, dv), task.problems, rows(dout), *task.tensors, rows(out), rows(lse), task.options,
        backend=work.backend, delta=rows(delta), dlse=None if dlse is None else rows(dlse),
    )  # fmt: skip


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
