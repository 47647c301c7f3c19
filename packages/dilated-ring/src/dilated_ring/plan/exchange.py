"""Who sends which parcels to whom, step by step."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from dilated_core import DilatedPattern, Span

from dilated_ring.plan.parcels import Heads, kept_of_part, parcel_shape
from dilated_ring.plan.sequences import CutSequence, Piece

Route = Literal["ring", "all_gather", "auto"]

_RELAYED_ROWS = 4096
"""With route "auto", parcels of at least so many rows of D numbers go from user to user: what a hop
sends is then large enough to hide its latency, and a rank holds one of them at a time."""


class Parcel(NamedTuple):
    """Rows of one branch that a rank sends.

    Attributes:
        sequence: Number of the sequence.
        branch: Number of the branch in the pattern.
        owner: The rank that holds the positions.
        piece: Number of the piece in which it holds them.
        positions: Of the sequence: the part of one segment that lies in the piece.
        users: The ranks whose queries see the rows, from the owner on in the order of the ranks and
            around.
        num_rows, num_pairs: Sizes of the packed tensors of k and of v.
    """

    sequence: int
    branch: int
    owner: int
    piece: int
    positions: Span
    users: tuple[int, ...]
    num_rows: int
    num_pairs: int

    @property
    def num_rows_of_head_dim(self) -> int:
        """Rows of D numbers that a batch row of k and v has together."""
        return 2 * self.num_rows * self.num_pairs


class Move(NamedTuple):
    """One message: parcels that one rank sends to another in a step."""

    source: int
    destination: int
    parcels: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """Everything that is sent in one attention call, the same value on all ranks.

    Attributes:
        pattern, heads, is_causal: Of the call.
        sequences: What is cut over ranks.
        size: Ranks of the group.
        route: `"ring"`: a parcel goes from user to user. `"all_gather"`: from its owner to all.
            `"auto"`: large ones go from user to user.
        parcels: All that travels.
    """

    pattern: DilatedPattern
    heads: Heads
    is_causal: bool
    sequences: tuple[CutSequence, ...]
    size: int
    route: Route
    parcels: tuple[Parcel, ...]

    @cached_property
    def moves(self) -> tuple[tuple[Move, ...], ...]:
        """The messages with rows of k and v, for each step; ordered by source and destination."""
        steps: list[list[tuple[int, int, int]]] = []
        for number, parcel in enumerate(self.parcels):
            chain = (parcel.owner, *parcel.users)
            for i, user in enumerate(parcel.users):
                step, source = (i, chain[i]) if self._is_relayed(parcel) else (0, parcel.owner)
                _at(steps, step).append((source, user, number))
        return tuple(_grouped(step) for step in steps)

    @cached_property
    def returns(self) -> tuple[tuple[Move, ...], ...]:
        """The messages with gradients of k and v; those of number i are sent after step i.

        On a ring the sums travel on with the rows and from the last user home; otherwise each user
        sends its share to the owner.
        """
        steps: list[list[tuple[int, int, int]]] = []
        for number, parcel in enumerate(self.parcels):
            chain = (*parcel.users, parcel.owner)
            for i, user in enumerate(parcel.users):
                step, to = (i, chain[i + 1]) if self._is_relayed(parcel) else (0, parcel.owner)
                _at(steps, step).append((user, to, number))
        return tuple(_grouped(step) for step in steps)

    @cached_property
    def sent_rows(self) -> tuple[int, ...]:
        """Rows of D numbers of k and v that each rank sends for a batch row, in forward."""
        rows = [0] * self.size
        for step in self.moves:
            for move in step:
                rows[move.source] += sum(self.parcels[i].num_rows_of_head_dim for i in move.parcels)
        return tuple(rows)

    def _is_relayed(self, parcel: Parcel) -> bool:
        is_large = parcel.num_rows_of_head_dim >= _RELAYED_ROWS
        return self.route == "ring" or (self.route == "auto" and is_large)

    @property
    def num_steps(self) -> int:
        """Steps of messages, each of which computation can hide."""
        return len(self.moves)


@lru_cache(maxsize=64)
def plan_exchange(
    pattern: DilatedPattern,
    heads: Heads,
    sequences: tuple[CutSequence, ...],
    *,
    size: int,
    is_causal: bool,
    route: Route,
) -> Exchange:
    """The parcels that queries of other ranks need, and no others."""
    parcels: list[Parcel] = []
    for number, sequence in enumerate(sequences):
        for branch in range(len(pattern.branches)):
            parcels.extend(_parcels_of(number, sequence, branch, pattern, heads, size, is_causal))
    return Exchange(pattern, heads, is_causal, sequences, size, route, tuple(parcels))


def _parcels_of(
    number: int,
    sequence: CutSequence,
    branch: int,
    pattern: DilatedPattern,
    heads: Heads,
    size: int,
    is_causal: bool,
) -> Iterator[Parcel]:
    w = min(pattern.segment_lengths[branch], sequence.seq_len)
    has_zero_keys = pattern.padding == "attended" and not is_causal
    held = sorted(
        (piece.span, rank) for rank, pieces in enumerate(sequence.pieces) for piece in pieces
    )
    starts = [span.start for span, _ in held]
    stops = [span.stop for span, _ in held]
    for owner, pieces in enumerate(sequence.pieces):
        for piece_number, piece in enumerate(pieces):
            for part in _shared_parts(piece, w, sequence.seq_len):
                begin = part.start // w * w
                end = min(begin + w, sequence.seq_len)
                others = held[bisect_right(stops, begin) : bisect_left(starts, end)]
                users = {
                    rank
                    for span, rank in others
                    if rank != owner
                    and not (is_causal and span.start < part.start)
                    and _meet(
                        pattern,
                        branch,
                        sequence.seq_len,
                        Span(max(span.start, begin), min(span.stop, end)),
                        part,
                        heads,
                        # The zero keys of a segment come with the part in which it begins.
                        has_zero_keys=has_zero_keys and part.start == begin,
                    )
                }
                if users:
                    ordered = sorted(users, key=lambda rank: (rank - owner) % size)
                    shape = parcel_shape(pattern, branch, sequence.seq_len, part, heads)
                    yield Parcel(number, branch, owner, piece_number, part, tuple(ordered), *shape)


def _shared_parts(piece: Piece, w: int, seq_len: int) -> Iterator[Span]:
    """The parts of a piece in segments of which other positions lie elsewhere: at most two."""
    span = piece.span
    first, last = span.start // w, (span.stop - 1) // w
    for n in sorted({first, last}):
        begin, end = n * w, min((n + 1) * w, seq_len)
        if begin < span.start or span.stop < end:
            yield Span(max(begin, span.start), min(end, span.stop))


def _meet(
    pattern: DilatedPattern,
    branch: int,
    seq_len: int,
    queries: Span,
    keys: Span,
    heads: Heads,
    *,
    has_zero_keys: bool,
) -> bool:
    """Whether a head keeps rows of both parts of a segment, or of queries that see zero keys."""
    mine = kept_of_part(pattern, branch, seq_len, queries, heads)
    theirs = kept_of_part(pattern, branch, seq_len, keys, heads)
    return any(
        a.num_rows and (b.num_rows or has_zero_keys) for a, b in zip(mine, theirs, strict=True)
    )


def _at(steps: list[list[tuple[int, int, int]]], index: int) -> list[tuple[int, int, int]]:
    while len(steps) <= index:
        steps.append([])
    return steps[index]


def _grouped(moves: list[tuple[int, int, int]]) -> tuple[Move, ...]:
    by_pair: dict[tuple[int, int], list[int]] = {}
    for source, destination, parcel in sorted(moves):
        by_pair.setdefault((source, destination), []).append(parcel)
    return tuple(Move(*pair, tuple(parcels)) for pair, parcels in by_pair.items())
