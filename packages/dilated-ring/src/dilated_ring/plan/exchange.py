"""Who sends which parcels to whom, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from dilated_core import DilatedPattern, Span, kept_rows

from dilated_ring.plan.block_parcels import block_parcels
from dilated_ring.plan.blocks import Pattern
from dilated_ring.plan.parcels import Heads, Parcel, around, kept_of_part, lanes, parcel_shape
from dilated_ring.plan.sequences import CutSequence, Piece

ExchangeKind = Literal["auto", "ring", "all_gather", "all_to_all"]
Route = Literal["ring", "all_gather", "auto"]

Transfer = tuple[int, int, int]
"""A rank, the rank that it sends to, and the number of the parcel."""

_RELAYED_ROWS = 4096
"""With route "auto", parcels of at least so many rows of D numbers go from user to user: what a hop
sends is then large enough to hide its latency, and a rank holds one of them at a time."""


class Move(NamedTuple):
    """One message: parcels that one rank sends to another in a step."""

    source: int
    destination: int
    parcels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Everything that is sent in one attention call, the same on all ranks.

    Attributes:
        pattern, heads, is_causal: Of the call.
        sequences: What is cut over ranks.
        size: Ranks of the group.
        route: `"ring"`: a parcel goes from user to user. `"all_gather"`: from its owner to all.
            `"auto"`: large ones go from user to user.
        parcels: All that travels.
    """

    pattern: Pattern
    heads: Heads
    is_causal: bool
    sequences: tuple[CutSequence, ...]
    size: int
    route: Route
    parcels: tuple[Parcel, ...]

    @cached_property
    def moves(self) -> tuple[tuple[Move, ...], ...]:
        """The messages with rows of k and v, for each step; ordered by source and destination."""
        steps: list[list[Transfer]] = [[] for _ in range(self.num_steps)]
        for number, parcel in enumerate(self.parcels):
            if not self.is_relayed(parcel):
                steps[0].extend((parcel.owner, user, number) for user in parcel.users)
                continue
            chain = (parcel.owner, *parcel.users)
            for step, user in enumerate(parcel.users):
                steps[step].append((chain[step], user, number))
        return tuple(_grouped(step) for step in steps)

    @cached_property
    def returns(self) -> tuple[tuple[Move, ...], ...]:
        """The messages with gradients of k and v; those of number i are sent after step i.

        On a ring the sums travel on with the rows and from the last user home; otherwise each user
        sends its share to the owner.
        """
        steps: list[list[Transfer]] = [[] for _ in range(self.num_steps)]
        for number, parcel in enumerate(self.parcels):
            if not self.is_relayed(parcel):
                steps[0].extend((user, parcel.owner, number) for user in parcel.users)
                continue
            chain = (*parcel.users, parcel.owner)
            for step, user in enumerate(parcel.users):
                steps[step].append((user, chain[step + 1], number))
        return tuple(_grouped(step) for step in steps)

    def is_relayed(self, parcel: Parcel) -> bool:
        """Whether the parcel goes from user to user, one step each, and not to all at once."""
        is_large = parcel.num_rows_of_head_dim >= _RELAYED_ROWS
        return self.route == "ring" or (self.route == "auto" and is_large)

    @cached_property
    def num_steps(self) -> int:
        """Steps of messages, each of which computation can hide."""
        steps = (len(x.users) if self.is_relayed(x) else 1 for x in self.parcels)
        return max(steps, default=0)


def route_of(kind: ExchangeKind) -> Route:
    """How rows of k and v travel where a call has `exchange=kind` and they do."""
    return "auto" if kind == "all_to_all" else kind


@lru_cache(maxsize=64)
def plan_exchange(
    pattern: Pattern,
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
        if not isinstance(pattern, DilatedPattern):
            parcels.extend(block_parcels(number, sequence, pattern, heads, is_causal))
            continue
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
) -> list[Parcel]:
    w = min(pattern.segment_lengths[branch], sequence.seq_len)
    parts: dict[int, list[_Part]] = {}
    for owner, pieces in enumerate(sequence.pieces):
        for piece_number, piece in enumerate(pieces):
            for span in _shared_parts(piece, w, sequence.seq_len):
                bits = _lanes_with_rows(pattern, branch, sequence.seq_len, span, heads)
                part = _Part(owner, piece_number, span, bits)
                parts.setdefault(span.start // w, []).append(part)
    found: list[Parcel] = []
    for n, sharing in parts.items():
        for owner, piece_number, span, mine in sharing:
            seen = mine
            if pattern.padding == "attended" and not is_causal and span.start == n * w:
                # The zero keys of a segment come with the part in which it begins.
                length = min(w, sequence.seq_len - n * w)
                seen |= _lanes_with_zero_keys(pattern, branch, w, length, heads)
            users = {
                part.rank
                for part in sharing
                if part.lanes & seen
                and part.rank != owner
                and not (is_causal and part.span.start < span.start)
            }
            if users:
                shape = parcel_shape(pattern, branch, sequence.seq_len, span, heads)
                found.append(
                    Parcel(number, branch, owner, piece_number, span, around(users, owner), *shape)
                )
    return sorted(found, key=lambda x: (x.owner, x.piece, x.positions))


class _Part(NamedTuple):
    """A part of a segment that lies in a piece, and which lanes keep rows of it, as bits."""

    rank: int
    piece: int
    span: Span
    lanes: int


def _shared_parts(piece: Piece, w: int, seq_len: int) -> Iterator[Span]:
    """The parts of a piece in segments of which other positions lie elsewhere: at most two."""
    span = piece.span
    first, last = span.start // w, (span.stop - 1) // w
    for n in sorted({first, last}):
        begin, end = n * w, min((n + 1) * w, seq_len)
        if begin < span.start or span.stop < end:
            yield Span(max(begin, span.start), min(end, span.stop))


def _lanes_with_rows(
    pattern: DilatedPattern, branch: int, seq_len: int, positions: Span, heads: Heads
) -> int:
    """One bit for each lane that keeps a row of a part of a segment."""
    kept = kept_of_part(pattern, branch, seq_len, positions, heads)
    return sum(1 << i for i, rows in enumerate(kept) if rows.num_rows)


def _lanes_with_zero_keys(
    pattern: DilatedPattern, branch: int, w: int, length: int, heads: Heads
) -> int:
    """One bit for each lane whose rows of a segment of this length are filled with zero keys."""
    rate = pattern.dilation_rates[branch]
    return sum(
        1 << i
        for i, lane in enumerate(lanes(pattern, branch, heads))
        if kept_rows(length, rate, lane.offset) < -(-w // rate)
    )


def _grouped(moves: list[Transfer]) -> tuple[Move, ...]:
    by_pair: dict[tuple[int, int], list[int]] = {}
    for source, destination, parcel in sorted(moves):
        by_pair.setdefault((source, destination), []).append(parcel)
    return tuple(Move(*pair, tuple(parcels)) for pair, parcels in by_pair.items())
