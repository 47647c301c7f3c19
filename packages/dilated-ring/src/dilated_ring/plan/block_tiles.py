"""Tiles of a pattern of blocks: rectangular problems of equal shape, side by side.

A rank attends with the parts of blocks of queries that it holds to the parts of blocks of keys that
it holds, or that a parcel brings. Parts that keep the same keys are one problem, and problems of
one shape are one call of the backend, as many as fit a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from dilated_core import DilatedPattern

from dilated_ring.plan.blocks import Rows, expanded, rows_of_sequence
from dilated_ring.plan.exchange import Exchange
from dilated_ring.plan.parcels import Heads, Parcel
from dilated_ring.plan.sequences import Piece
from dilated_ring.plan.tiles import cut_into_tiles

_GATHERED_BYTES = {"cpu": 2**21}
"""Keys and values that a call gathers: on CPUs about a processor's cache."""

_GATHERED_BYTES_ELSEWHERE = 2**28

_MOST_QUERIES = 4096
"""Queries of one problem, so that its result is small beside a shard."""


class Runs(NamedTuple):
    """Rows of a tensor: runs that follow one another, in the order in which they are taken.

    Attributes:
        starts, lengths: int64, of each run.
    """

    starts: torch.Tensor
    lengths: torch.Tensor

    def numbers(self) -> torch.Tensor:
        """The number of each row."""
        return expanded(self.starts, self.lengths)


class Tile(NamedTuple):
    """Problems of one shape.

    Attributes:
        heads, kv_heads: Of the tensors of queries, and of keys.
        num_problems: How many problems, each with an equal share of the rows.
        queries, keys: Their rows, problem by problem: a slice where they follow one another.
        is_causal: Query i of a problem sees its keys j ≤ i; the keys are those of the queries.
    """

    heads: slice
    kv_heads: slice
    num_problems: int
    queries: slice | Runs
    keys: slice | Runs
    is_causal: bool


@lru_cache(maxsize=4096)
def local_tiles(
    exchange: Exchange, sequence: int, rank: int, row_bytes: int, device: torch.device
) -> tuple[Tile, ...]:
    """The tiles of a rank's queries with its own keys.

    Args:
        exchange: Of a pattern of blocks.
        sequence: Number of the sequence.
        rank: The rank.
        row_bytes: Bytes of a position of one head of k, of all batch rows together.
        device: Of the tensors.
    """
    pieces = exchange.sequences[sequence].pieces[rank]
    kv_heads = tuple(range(exchange.heads.num_kv_heads))
    return _tiles(exchange, sequence, pieces, pieces, kv_heads, row_bytes, device, is_own=True)


@lru_cache(maxsize=4096)
def parcel_tiles(
    exchange: Exchange, number: int, rank: int, row_bytes: int, device: torch.device
) -> tuple[Tile, ...]:
    """The tiles of a rank's queries with the keys of a parcel; arguments as of `local_tiles`."""
    parcel = exchange.parcels[number]
    keys = pieces_of_parcel(parcel)
    queries = exchange.sequences[parcel.sequence].pieces[rank]
    return _tiles(
        exchange, parcel.sequence, queries, keys, parcel.kv_heads, row_bytes, device, is_own=False
    )


def pieces_of_parcel(parcel: Parcel) -> list[Piece]:
    """The positions of a parcel of blocks, and where they lie in it."""
    pieces: list[Piece] = []
    for span in parcel.spans:
        pieces.append(Piece(span, pieces[-1].rows.stop if pieces else 0))
    return pieces


def _tiles(
    exchange: Exchange,
    sequence: int,
    queries: Sequence[Piece],
    keys: Sequence[Piece],
    kv_heads: tuple[int, ...],
    row_bytes: int,
    device: torch.device,
    *,
    is_own: bool,
) -> tuple[Tile, ...]:
    if not queries or not keys:
        return ()
    blocks, heads = exchange.pattern, exchange.heads
    assert not isinstance(blocks, DilatedPattern)
    seq_len = exchange.sequences[sequence].seq_len
    rows = rows_of_sequence(blocks, seq_len, is_causal=exchange.is_causal)
    parts = _Parts(rows, queries, keys)
    limit = _GATHERED_BYTES.get(device.type, _GATHERED_BYTES_ELSEWHERE) // max(1, 2 * row_bytes)
    tiles: list[Tile] = []
    for p, q_slice, kv_slice in _heads_of_lists(rows.lists_of(heads), heads):
        if kv_slice.start not in kv_heads:
            continue
        first = kv_heads.index(kv_slice.start)
        num_heads = kv_slice.stop - kv_slice.start
        where = q_slice, slice(first, first + num_heads)
        if is_own:
            tiles += _squares(parts, p, where, device)
        tiles += _rectangles(parts, p, where, max(1, limit // num_heads), device)
    return tuple(tiles)


def _heads_of_lists(of_head: Sequence[int], heads: Heads) -> Iterator[tuple[int, slice, slice]]:
    """Lists, with heads of q that share them, and the heads of k and v of these."""
    group = heads.num_heads // heads.num_kv_heads
    begin = 0
    while begin < heads.num_heads:
        end = begin
        while end < heads.num_heads and of_head[end] == of_head[begin]:
            end += 1
        if begin % group or end % group:
            # A list for a part of the heads that share a head of k: no further than this one.
            end = min(end, (begin // group + 1) * group)
        yield of_head[begin], slice(begin, end), slice(begin // group, -(-end // group))
        begin = end


class _Parts:
    """Parts of blocks of queries, and of keys by block."""

    def __init__(self, rows: Rows, queries: Sequence[Piece], keys: Sequence[Piece]) -> None:
        self.rows = rows
        self.queries = cut_into_tiles(queries, rows.block_size)
        self.keys = cut_into_tiles(keys, rows.block_size)
        blocks = torch.tensor(
            [part.span.start // rows.block_size for part in self.keys], device="cpu"
        )
        self.num_problemss = torch.bincount(blocks, minlength=rows.num_blocks)
        self.first = self.num_problemss.cumsum(0) - self.num_problemss
        self.query_blocks = torch.tensor(
            [part.span.start // rows.block_size for part in self.queries], device="cpu"
        )

    def seen(self, p: int) -> list[list[int]]:
        """For each part of queries, the numbers of the parts of keys that it sees as a whole."""
        columns, row = self.rows.of_blocks(p, self.query_blocks)
        counts = self.num_problemss[columns]
        numbers = expanded(self.first[columns], counts).tolist()  # pyright: ignore
        seen: list[list[int]] = [[] for _ in self.queries]
        for query, number in zip(row.repeat_interleave(counts).tolist(), numbers, strict=True):  # pyright: ignore
            seen[query].append(number)  # pyright: ignore
        for query, part in enumerate(self.queries):
            block, inside = divmod(part.span.start, self.rows.block_size)
            if inside and bool(self.rows.diagonal[p, block]):
                first = int(self.first[block])
                for number in range(first, first + int(self.num_problemss[block])):
                    if self.keys[number].span.stop <= part.span.start:
                        seen[query].append(number)
        return seen


def _squares(
    parts: _Parts, p: int, where: tuple[slice, slice], device: torch.device
) -> Iterator[Tile]:
    """Causal squares: each part of a block on the diagonal with itself."""
    by_length: dict[int, list[Piece]] = {}
    kept: list[bool] = parts.rows.diagonal[p, parts.query_blocks].tolist()  # pyright: ignore
    for part, is_kept in zip(parts.queries, kept, strict=True):
        if is_kept:
            by_length.setdefault(part.span.length, []).append(part)
    for pieces in by_length.values():
        runs = _rows_of(pieces, device)
        yield Tile(*where, len(pieces), runs, runs, is_causal=True)


def _rectangles(
    parts: _Parts, p: int, where: tuple[slice, slice], most_keys: int, device: torch.device
) -> Iterator[Tile]:
    by_keys: dict[tuple[int, ...], list[Piece]] = {}
    for part, numbers in zip(parts.queries, parts.seen(p), strict=True):
        if numbers:
            by_keys.setdefault(tuple(numbers), []).append(part)
    by_shape: dict[tuple[int, int], list[tuple[list[Piece], list[Piece]]]] = {}
    for numbers, all_queries in by_keys.items():
        keys = [parts.keys[n] for n in numbers]
        num_keys = sum(part.span.length for part in keys)
        for queries in _in_lots(all_queries):
            shape = sum(part.span.length for part in queries), num_keys
            by_shape.setdefault(shape, []).append((queries, keys))
    for (_, num_keys), problems in by_shape.items():
        step = max(1, most_keys // num_keys)
        for i in range(0, len(problems), step):
            some = problems[i : i + step]
            yield Tile(
                *where,
                len(some),
                _rows_of((part for queries, _ in some for part in queries), device),
                _rows_of((part for _, keys in some for part in keys), device),
                is_causal=False,
            )


def _in_lots(parts: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The parts, cut into lists of about `_MOST_QUERIES` positions."""
    lot: list[Piece] = []
    for part in parts:
        if lot and sum(x.span.length for x in lot) + part.span.length > _MOST_QUERIES:
            yield lot
            lot = []
        lot.append(part)
    yield lot


def _rows_of(parts: Iterable[Piece], device: torch.device) -> slice | Runs:
    """The rows of some parts in a tensor, where neighbours are one run."""
    runs: list[slice] = []
    for part in parts:
        rows = part.rows
        if runs and runs[-1].stop == rows.start:
            rows = slice(runs.pop().start, rows.stop)
        runs.append(rows)
    if len(runs) == 1:
        return runs[0]
    starts = torch.tensor([run.start for run in runs], device="cpu")
    lengths = torch.tensor([run.stop - run.start for run in runs], device="cpu")
    return Runs(starts.to(device), lengths.to(device))
