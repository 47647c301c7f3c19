"""Parcels: the rows of k and v that one branch keeps of a part of a segment, packed to travel.

A branch of rate r keeps every r-th position, each head from an offset of its own. A parcel holds
just these rows, as a `(B, rows, pairs, D)` tensor. A pair is a kv head and an offset at which some
head of q reads it; without grouped queries each head is a pair.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from dilated_core import DilatedPattern, Problem, Rows, Span, head_offset, kept_rows, plan_problems


class Heads(NamedTuple):
    """The heads of the tensors.

    Attributes:
        num_heads, num_kv_heads: H and H_kv, of the tensors.
        head_range: (first, total) as for `plan_problems`.
    """

    num_heads: int
    num_kv_heads: int
    head_range: tuple[int, int]


class Parcel(NamedTuple):
    """Rows of one branch, or of blocks that the same ranks need, that a rank sends.

    Attributes:
        sequence: Number of the sequence.
        branch: Number of the branch in the pattern; 0 for blocks.
        owner: The rank that holds the positions.
        piece: Number of the piece in which it holds them.
        positions: Of the sequence: the part of one segment that lies in the piece; for blocks, from
            the first one to the last one.
        users: The ranks whose queries see the rows, from the owner on in the order of the ranks and
            around.
        num_rows, num_pairs: Sizes of the packed tensors of k and of v.
        spans, kv_heads: For blocks, the positions of the sequence and the heads of k and v that it
            holds; empty for a branch, where `kept_of_part` tells them.
    """

    sequence: int
    branch: int
    owner: int
    piece: int
    positions: Span
    users: tuple[int, ...]
    num_rows: int
    num_pairs: int
    spans: tuple[Span, ...] = ()
    kv_heads: tuple[int, ...] = ()

    @property
    def num_rows_of_head_dim(self) -> int:
        """Rows of D numbers that a batch row of k and v has together."""
        return 2 * self.num_rows * self.num_pairs


def around(users: Iterable[int], owner: int) -> tuple[int, ...]:
    """The users from the owner on in the order of the ranks and around."""
    ordered = sorted(users)
    first = bisect_left(ordered, owner)
    return (*ordered[first:], *ordered[:first])


def parts_of_heads(num_heads: int, num_kv_heads: int, size: int) -> list[tuple[slice, slice]]:
    """The heads of q and those of k and v that each rank gets, with whole groups of queries.

    Raises:
        ValueError: If there are fewer heads of k and v than ranks.
    """
    if num_kv_heads < size:
        raise ValueError(
            f"exchange is 'all_to_all' over {size} ranks, and k and v have {num_kv_heads} heads; "
            f"each rank needs at least one, so use exchange='ring' or a smaller group."
        )
    quotient, remainder = divmod(num_kv_heads, size)
    bounds = accumulate((quotient + (i < remainder) for i in range(size)), initial=0)
    group = num_heads // num_kv_heads
    return [(slice(a * group, b * group), slice(a, b)) for a, b in pairwise(bounds)]


class Lane(NamedTuple):
    """The pairs of one offset.

    Attributes:
        offset: Position in the segment of the first row that these heads keep.
        kv_heads: Ascending heads of k and v.
        pairs: Where each of them lies in the parcel.
    """

    offset: int
    kv_heads: tuple[int, ...]
    pairs: tuple[int, ...]


@lru_cache(maxsize=256)
def lanes(pattern: DilatedPattern, branch: int, heads: Heads) -> tuple[Lane, ...]:
    """The pairs of a branch by offset; pairs are numbered in the order of the heads of q."""
    rate = pattern.dilation_rates[branch]
    first, total = heads.head_range
    group = heads.num_heads // heads.num_kv_heads
    numbers: dict[tuple[int, int], int] = {}
    for h in range(heads.num_heads):
        offset = head_offset(first + h, rate, total, pattern.head_offsets)
        numbers.setdefault((offset, h // group), len(numbers))
    by_offset: dict[int, list[tuple[int, int]]] = {}
    for (offset, kv_head), pair in numbers.items():
        by_offset.setdefault(offset, []).append((kv_head, pair))
    return tuple(
        Lane(offset, tuple(h for h, _ in items), tuple(p for _, p in items))
        for offset, items in sorted(by_offset.items())
    )


class Kept(NamedTuple):
    """The rows of one lane in a part of a segment.

    Attributes:
        lane: The pairs.
        first: Position in the part of the first row.
        num_rows: How many rows, one rate apart.
    """

    lane: Lane
    first: int
    num_rows: int


@lru_cache(maxsize=4096)
def kept_of_part(
    pattern: DilatedPattern, branch: int, seq_len: int, positions: Span, heads: Heads
) -> tuple[Kept, ...]:
    """What the lanes of a branch keep of `positions`, which lie in one segment."""
    rate = pattern.dilation_rates[branch]
    w = min(pattern.segment_lengths[branch], seq_len)
    begin = positions.start // w * w
    kept: list[Kept] = []
    for lane in lanes(pattern, branch, heads):
        before = kept_rows(positions.start - begin, rate, lane.offset)
        upto = kept_rows(positions.stop - begin, rate, lane.offset)
        first = begin + lane.offset + before * rate - positions.start
        kept.append(Kept(lane, first, upto - before))
    return tuple(kept)


def parcel_shape(
    pattern: DilatedPattern, branch: int, seq_len: int, positions: Span, heads: Heads
) -> tuple[int, int]:
    """(rows, pairs) of a parcel; a lane with fewer rows than the longest has rows of zeros."""
    kept = kept_of_part(pattern, branch, seq_len, positions, heads)
    return max(x.num_rows for x in kept), sum(len(x.lane.pairs) for x in kept)


@lru_cache(maxsize=4096)
def parcel_problems(
    pattern: DilatedPattern,
    branch: int,
    seq_len: int,
    queries: Span,
    positions: Span,
    heads: Heads,
    batch_size: int,
    is_causal: bool,
) -> tuple[Problem, ...]:
    """The problems of local queries with the keys of a parcel.

    Like `plan_problems`, for one branch, with `keys` that view the parcel and not the tensor of the
    rank that sent it. Queries and positions do not overlap, so each query sees all rows of the
    parcel or, under causality, none.
    """
    w = pattern.segment_lengths[branch]
    rate = pattern.dilation_rates[branch]
    single = DilatedPattern([w], [rate], head_offsets=pattern.head_offsets, padding=pattern.padding)
    w = min(w, seq_len)
    begin = positions.start // w * w
    planned = plan_problems(
        single,
        queries=queries,
        keys=positions,
        seq_len=seq_len,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_range=heads.head_range,
        batch_size=batch_size,
        is_causal=is_causal,
    )
    pair_of = {
        (lane.offset, kv_head): pair
        for lane in lanes(pattern, branch, heads)
        for kv_head, pair in zip(lane.kv_heads, lane.pairs, strict=True)
    }
    problems: list[Problem] = []
    for problem in planned:
        keys = problem.keys
        # The position in its segment of the first row that the first head keeps.
        offset = (positions.start + keys.start - begin) % rate
        pairs = [
            pair_of[offset + i * keys.offset_step, keys.first_head + i * keys.head_step]
            for i in range(keys.num_heads)
        ]
        problems.extend(_over_pairs(replace(problem, is_first=False, branch=branch), pairs))
    return tuple(problems)


def _over_pairs(problem: Problem, pairs: list[int]) -> list[Problem]:
    """The problem with keys from the pairs of a parcel, cut where they have no constant step."""
    steps = {b - a for a, b in pairwise(pairs)}
    if len(steps) <= 1 and all(step > 0 for step in steps):
        return [replace(problem, keys=_packed(problem.keys, pairs[0], len(pairs), *steps))]
    group = problem.queries.num_heads // len(pairs)
    return [
        replace(
            problem,
            queries=problem.queries.of_heads(i * group, group),
            keys=_packed(problem.keys, pair, 1),
        )
        for i, pair in enumerate(pairs)
    ]


def _packed(keys: Rows, first_pair: int, num_pairs: int, step: int = 1) -> Rows:
    """Rows of a parcel: all rows that these pairs have."""
    return replace(
        keys,
        start=0,
        num_segments=1,
        rate=1,
        first_head=first_pair,
        num_heads=num_pairs,
        head_step=step,
        offset_step=0,
        is_everything=False,
    )
