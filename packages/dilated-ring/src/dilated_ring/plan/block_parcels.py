"""Parcels of a pattern of blocks: the blocks of k and v that rows of other ranks keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from dilated_core import Span

from dilated_ring.layout import joined, num_positions
from dilated_ring.plan.blocks import Blocks, BlocksByLength, Rows, rows_of_sequence
from dilated_ring.plan.parcels import Heads, Parcel, around
from dilated_ring.plan.sequences import CutSequence, Piece
from dilated_ring.plan.tiles import cut_into_tiles


def block_parcels(
    number: int,
    sequence: CutSequence,
    blocks: Blocks | BlocksByLength,
    heads: Heads,
    is_causal: bool,
) -> list[Parcel]:
    """What each rank sends: each part of a block to the ranks that keep it, and to no others.

    Blocks of one rank that the same ranks need are one parcel.
    """
    if sequence.seq_len == 0:
        return []
    # Also where nothing is sent: these refuse patterns that do not fit.
    rows = rows_of_sequence(blocks, sequence.seq_len, is_causal=is_causal)
    of_head = rows.lists_of(heads)
    if sum(1 for pieces in sequence.pieces if pieces) < 2:
        return []
    found: list[Parcel] = []
    needed = {p: _needed(rows, p, sequence.pieces) for p in set(of_head)}
    for lists, kv_heads in _heads_by_lists(of_head, heads):
        users = torch.stack([needed[p] for p in lists]).any(0)
        late = [x for p in lists for x in _late_queries(rows, p, sequence.pieces)]
        for owner, pieces in enumerate(sequence.pieces):
            for piece_number, piece in enumerate(pieces):
                for ranks, spans in _by_users(rows, piece, users, late, owner):
                    found.append(
                        Parcel(
                            number,
                            0,
                            owner,
                            piece_number,
                            Span(spans[0].start, spans[-1].stop),
                            around(ranks, owner),
                            num_positions(spans),
                            len(kv_heads),
                            spans,
                            kv_heads,
                        )
                    )
    return sorted(found, key=lambda x: (x.owner, x.piece, x.positions, x.kv_heads, x.users))


def _heads_by_lists(
    of_head: Sequence[int], heads: Heads
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The heads of k and v by the lists of the heads of q that read them."""
    group = heads.num_heads // heads.num_kv_heads
    found: dict[tuple[int, ...], list[int]] = {}
    for kv_head in range(heads.num_kv_heads):
        lists = tuple(sorted(set(of_head[kv_head * group : (kv_head + 1) * group])))
        found.setdefault(lists, []).append(kv_head)
    return [(lists, tuple(kv_heads)) for lists, kv_heads in found.items()]


def _needed(rows: Rows, p: int, pieces: Sequence[Sequence[Piece]]) -> torch.Tensor:
    """`(ranks, n)` bool: the blocks that some row of a rank keeps, apart from the diagonal."""
    needed = torch.zeros(len(pieces), rows.num_blocks, dtype=torch.bool, device="cpu")
    for rank, held in enumerate(pieces):
        for piece in held:
            first, stop = (
                piece.span.start // rows.block_size,
                -(-piece.span.stop // rows.block_size),
            )
            bounds = rows.offsets[p, first], rows.offsets[p, stop]
            needed[rank, rows.columns[int(bounds[0]) : int(bounds[1])]] = True
    return needed


class _Late(NamedTuple):
    """A rank whose queries begin inside a block that they keep, under causality."""

    rank: int
    block: int
    start: int


def _late_queries(rows: Rows, p: int, pieces: Sequence[Sequence[Piece]]) -> Iterator[_Late]:
    for rank, held in enumerate(pieces):
        for piece in held:
            block, inside = divmod(piece.span.start, rows.block_size)
            if inside and bool(rows.diagonal[p, block]):
                yield _Late(rank, block, piece.span.start)


def _by_users(
    rows: Rows, piece: Piece, needed: torch.Tensor, late: Sequence[_Late], owner: int
) -> Iterator[tuple[tuple[int, ...], tuple[Span, ...]]]:
    """The ranks that need the same blocks of a piece, and the positions of these blocks."""
    parts = [part.span for part in cut_into_tiles([piece], rows.block_size)]
    first = parts[0].start // rows.block_size
    users = needed[:, first : first + len(parts)].t().clone()  # (parts, ranks)
    for rank, block, start in late:
        i = block - first
        if 0 <= i < len(parts) and parts[i].stop <= start:
            users[i, rank] = True
    users[:, owner] = False
    pairs: list[tuple[int, int]] = users.nonzero().tolist()  # pyright: ignore
    ranks_of: dict[int, list[int]] = {}
    for part, rank in pairs:
        ranks_of.setdefault(part, []).append(rank)
    members: dict[tuple[int, ...], list[Span]] = {}
    for part, ranks in ranks_of.items():
        members.setdefault(tuple(ranks), []).append(parts[part])
    for ranks, spans in members.items():
        yield ranks, joined(spans)
