"""What a rank computes in a step: tasks, from branches of dilated attention or from blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import torch
from dilated_core import (
    AttentionBackend,
    AttentionOptions,
    AttentionOutput,
    DilatedPattern,
    Gradients,
    Problem,
    Rows,
    Span,
    attend_,
    differentiate_,
    plan_problems,
)
from dilated_core.dropout import DropoutRows, head_numbers, key_numbers, query_numbers

from dilated_ring.execution.parcels import KeysAndValues, pack_rows
from dilated_ring.execution.taken import Taken
from dilated_ring.plan.block_tiles import (
    Tile,
    local_tiles,
    parcel_tiles,
    pieces_of_parcel,
)
from dilated_ring.plan.exchange import Exchange
from dilated_ring.plan.parcels import parcel_problems
from dilated_ring.plan.parts import in_parts
from dilated_ring.plan.sequences import CutSequence, Piece
from dilated_ring.plan.tiles import cut_into_tiles, in_order, may_meet
from dilated_ring.transport.contract import Transport


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


class Task(NamedTuple):
    """Queries of a rank with keys of one tensor: its own k, or a parcel.

    Attributes:
        problems: On the tensors.
        queries: The rows of the rank's tensors that hold the queries.
        keys: The rows of the rank's k and v, or of the parcel.
        tensors: These rows of q, k and v.
        options: Of the call.
        parcel: Number of the parcel; -1 for the rank's own k and v.
    """

    problems: tuple[Problem, ...]
    queries: Taken
    keys: Taken
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    options: AttentionOptions
    parcel: int = -1

    def attend_(self, backend: AttentionBackend, into: AttentionOutput) -> None:
        """Merge the results into those of the rank, in place."""
        out, lse = (self.queries.take(x) for x in into)
        attend_(
            AttentionOutput(out, lse), self.problems, *self.tensors, self.options, backend=backend
        )
        self.queries.put_(into.out, out)
        self.queries.put_(into.lse, lse)

    def differentiate_(
        self,
        backend: AttentionBackend,
        into: Gradients,
        dout: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        delta: torch.Tensor,
        dlse: torch.Tensor | None,
    ) -> None:
        """Add the gradients to those of the rank's q, and of k and v or of the parcel, in place."""
        rows = self.queries.take
        dq, *dkv = into
        sums = self.queries.sums(dq), *(self.keys.sums(x) for x in dkv)
        differentiate_(
            (sums[0], sums[1], sums[2]), self.problems, rows(dout), *self.tensors, rows(out),
            rows(lse), self.options, backend=backend, delta=rows(delta),
            dlse=None if dlse is None else rows(dlse),
        )  # fmt: skip
        self.queries.add_(dq, sums[0])
        for x, grad in zip(dkv, sums[1:], strict=True):
            self.keys.add_(x, grad)


def local_tasks(
    work: Work, rank: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Iterator[Task]:
    """Queries of this rank with the keys of this rank."""
    exchange = work.exchange
    if not isinstance(exchange.pattern, DilatedPattern):
        for number, sequence in enumerate(exchange.sequences):
            tiles = local_tiles(exchange, number, rank, _row_bytes(k), k.device)
            pieces = sequence.pieces[rank]
            yield from _block_tasks(work, sequence, rank, tiles, q, (k, v), pieces)
    else:
        yield from _local_branches(work, exchange.pattern, rank, q, k, v)


def parcel_tasks(
    work: Work, rank: int, q: torch.Tensor, parcels: Mapping[int, KeysAndValues]
) -> Iterator[Task]:
    """Queries of this rank with the keys of parcels of other ranks."""
    exchange = work.exchange
    if not isinstance(exchange.pattern, DilatedPattern):
        for number, kv in parcels.items():
            parcel = exchange.parcels[number]
            tiles = parcel_tiles(exchange, number, rank, _row_bytes(kv[0]), q.device)
            sequence = exchange.sequences[parcel.sequence]
            pieces = pieces_of_parcel(parcel)
            yield from _block_tasks(work, sequence, rank, tiles, q, kv, pieces, number)
    else:
        yield from _parcel_branches(work, exchange.pattern, rank, q, parcels)


def _block_tasks(
    work: Work,
    sequence: CutSequence,
    rank: int,
    tiles: Sequence[Tile],
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
    pieces: Sequence[Piece],
    parcel: int = -1,
) -> Iterator[Task]:
    """Tasks of the tiles.

    Args:
        work: The plan and the options.
        sequence: The sequence.
        rank: This rank.
        tiles: Of the queries of the rank with the rows of k and v.
        q: `(B, L, H, D)`.
        kv: `(B, N, H_kv, D)`, of the rank or of a parcel.
        pieces: The positions of these rows.
        parcel: Number of the parcel, or -1.
    """
    if not q.numel() or not tiles:
        return
    numbers = _block_numbers(work, sequence, rank, q, kv[0].shape[1], pieces)
    hidden = None
    if (mask := work.hidden) is not None:
        hidden = mask.new_zeros(kv[0].shape[:2])
        for span, at in pieces:
            where = slice(sequence.start + span.start, sequence.start + span.stop)
            hidden[:, at : at + span.length] = mask[:, where]
    for tile in tiles:
        queries = Taken(tile.queries, tile.heads, tile.num_problems)
        keys = Taken(tile.keys, tile.kv_heads, tile.num_problems)
        rows = None
        if numbers is not None:
            assert numbers.heads is not None
            rows = DropoutRows(
                queries.of_all_heads(numbers.queries),
                keys.of_all_heads(numbers.keys),
                numbers.heads[tile.heads],
            )
        options = work.options._replace(
            key_padding_mask=None if hidden is None else keys.of_all_heads(hidden),
            dropout_rows=rows,
        )
        tensors = queries.take(q), keys.take(kv[0]), keys.take(kv[1])
        every = _everything(tensors[0]), _everything(tensors[1])
        problem = Problem(*every, tile.is_causal, zero_keys=0, is_first=False)
        yield Task((problem,), queries, keys, tensors, options, parcel)


def _block_numbers(
    work: Work,
    sequence: CutSequence,
    rank: int,
    q: torch.Tensor,
    num_keys: int,
    pieces: Sequence[Piece],
) -> DropoutRows | None:
    """The numbers of the rank's queries `(B, L)`, of keys `(B, N)` and of heads; or None."""
    if not work.options.dropout_p:
        return None
    B, L, H = q.shape[:3]
    seed, first_head = work.options.dropout_seed, work.exchange.heads.head_range[0]
    queries, keys = (
        torch.zeros(B, length, dtype=torch.int32, device=q.device) for length in (L, num_keys)
    )
    for span, at in sequence.pieces[rank]:
        place = B, sequence.start + span.start, span.length, q.device
        queries[:, at : at + span.length] = query_numbers(seed, *place)
    for span, at in pieces:
        place = B, sequence.start + span.start, span.length, q.device
        keys[:, at : at + span.length] = key_numbers(seed, *place)
    return DropoutRows(queries, keys, head_numbers(seed, first_head, H, q.device))


def _everything(x: torch.Tensor) -> Rows:
    """All rows of `(B, M, H, D)`."""
    B, M, H = x.shape[:3]
    return Rows(0, B, 0, 1, M, M, 1, 0, H, 1, 0, is_everything=True)


def _row_bytes(k: torch.Tensor) -> int:
    """Bytes of a position of one head, of all batch rows."""
    return k.shape[0] * k.shape[3] * k.element_size()


def _local_branches(
    work: Work,
    pattern: DilatedPattern,
    rank: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> Iterator[Task]:
    exchange = work.exchange
    for sequence in exchange.sequences:
        pieces = cut_into_tiles(sequence.pieces[rank], work.tile_size)
        for queries, keys in in_order(pieces, pieces, work.tile_size):
            if not may_meet(pattern, queries.span, keys.span, is_causal=exchange.is_causal):
                continue
            is_whole = queries.rows == keys.rows == slice(0, q.shape[1])
            problems = plan_problems(
                pattern,
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
            dropout_keys = _key_numbers(work, sequence, keys.span, q)
            yield Task(
                in_parts(problems, q.shape[:3].numel()),
                Taken(queries.rows),
                Taken(keys.rows),
                (q[:, queries.rows], k[:, keys.rows], v[:, keys.rows]),
                _options(work, sequence, queries, q, hidden, dropout_keys),
            )


def _parcel_branches(
    work: Work,
    pattern: DilatedPattern,
    rank: int,
    q: torch.Tensor,
    parcels: Mapping[int, KeysAndValues],
) -> Iterator[Task]:
    exchange = work.exchange
    by_sequence = groupby(parcels, key=lambda number: exchange.parcels[number].sequence)
    for sequence_number, numbers in by_sequence:
        sequence = exchange.sequences[sequence_number]
        pieces = cut_into_tiles(sequence.pieces[rank], work.tile_size)
        for number, queries in in_order(tuple(numbers), pieces, work.tile_size):
            parcel = exchange.parcels[number]
            problems = parcel_problems(
                pattern, parcel.branch, sequence.seq_len, queries.span, parcel.positions,
                exchange.heads, q.shape[0], exchange.is_causal,
            )  # fmt: skip
            if not problems:
                continue
            hidden = work.hidden
            if hidden is not None:
                H_kv = exchange.heads.num_kv_heads
                hidden = hidden.unsqueeze(-1).expand(-1, -1, H_kv)
                hidden = pack_rows(exchange, parcel, hidden, at=sequence.start)
            dropout_keys = _key_numbers(work, sequence, parcel.positions, q)
            if dropout_keys is not None:
                H_kv = exchange.heads.num_kv_heads
                dropout_keys = dropout_keys.unsqueeze(-1).expand(-1, -1, H_kv)
                dropout_keys = pack_rows(exchange, parcel, dropout_keys, at=-parcel.positions.start)
            yield Task(
                in_parts(problems, q.shape[:3].numel()), Taken(queries.rows), Taken(slice(None)),
                (q[:, queries.rows], *parcels[number]),
                _options(work, sequence, queries, q, hidden, dropout_keys), number,
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
