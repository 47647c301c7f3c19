"""How many bytes each rank sends, and which exchange "auto" takes: for plan and execution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dilated_core import DilatedPattern

from dilated_ring.layout import num_positions
from dilated_ring.plan.blocks import Pattern
from dilated_ring.plan.exchange import Exchange, ExchangeKind
from dilated_ring.plan.parcels import Heads, parts_of_heads
from dilated_ring.plan.sequences import Spans


class Sizes(NamedTuple):
    """The sizes of a call that bytes depend on.

    Attributes:
        batch_size, head_dim: B and D.
        itemsize: Bytes of a number of q, k and v.
    """

    batch_size: int
    head_dim: int
    itemsize: int

    @property
    def wide_itemsize(self) -> int:
        """Bytes of a number of lse and of the gradients that travel: float32 at least."""
        return max(4, self.itemsize)


class Traffic(NamedTuple):
    """Bytes that each rank sends.

    Attributes:
        forward: In forward.
        backward: In the backward pass of `out`.
    """

    forward: tuple[int, ...]
    backward: tuple[int, ...]

    @property
    def total(self) -> int:
        """Of all ranks, forward and backward."""
        return sum(self.forward) + sum(self.backward)


def traffic_of_rows(exchange: Exchange, sizes: Sizes) -> Traffic:
    """Rows of k and v go to queries, twice, and their gradients come back."""
    sent, returned = [0] * exchange.size, [0] * exchange.size
    for parcel in exchange.parcels:
        rows = parcel.num_rows_of_head_dim
        if exchange.is_relayed(parcel):
            sent[parcel.owner] += rows
            for user in parcel.users[:-1]:
                sent[user] += rows
        else:
            sent[parcel.owner] += rows * len(parcel.users)
        for user in parcel.users:
            returned[user] += rows
    numbers = sizes.batch_size * sizes.head_dim
    narrow, wide = numbers * sizes.itemsize, numbers * sizes.wide_itemsize
    return Traffic(
        tuple(rows * narrow for rows in sent),
        tuple(a * narrow + b * wide for a, b in zip(sent, returned, strict=True)),
    )


def traffic_of_heads(ranks: Spans, heads: Heads, sizes: Sizes) -> Traffic:
    """q, k and v go from positions to heads, out and lse come back; gradients the other way.

    Raises:
        ValueError: If there are fewer heads of k and v than ranks.
    """
    seq_len = sum(num_positions(spans) for spans in ranks)
    row = sizes.head_dim * sizes.itemsize
    forward: list[int] = []
    backward: list[int] = []
    parts = parts_of_heads(heads.num_heads, heads.num_kv_heads, len(ranks))
    for spans, (q_part, kv_part) in zip(ranks, parts, strict=True):
        mine = num_positions(spans)
        q_heads, kv_heads = q_part.stop - q_part.start, kv_part.stop - kv_part.start
        # (positions) x (heads) of one tensor of q's heads that leave, and of one of k's heads.
        q_out, kv_out = mine * (heads.num_heads - q_heads), mine * (heads.num_kv_heads - kv_heads)
        q_back, kv_back = (seq_len - mine) * q_heads, (seq_len - mine) * kv_heads
        out_and_lse = row + sizes.wide_itemsize
        forward.append(sizes.batch_size * ((q_out + 2 * kv_out) * row + q_back * out_and_lse))
        backward.append(sizes.batch_size * (q_out * out_and_lse + (q_back + 2 * kv_back) * row))
    return Traffic(tuple(forward), tuple(backward))


def mask_bytes(ranks: Spans, batch_size: int) -> tuple[int, ...]:
    """Bytes of key padding masks that each rank sends in forward: all of its own to all others."""
    return tuple(batch_size * num_positions(spans) * (len(ranks) - 1) for spans in ranks)


def gathering_bytes(ranks: Spans, heads: Heads, sizes: Sizes) -> tuple[int, ...]:
    """Bytes that each rank would send in forward if every rank gathered all rows of k and v."""
    row = 2 * heads.num_kv_heads * sizes.head_dim * sizes.itemsize
    return tuple(row * sent for sent in mask_bytes(ranks, sizes.batch_size))


WayKind = Literal["alone", "rows", "heads"]
"""What a call sends: nothing; rows of k and v to queries; positions for heads (all_to_all)."""


def is_aligned(pattern: Pattern, ranks: Spans, *, is_causal: bool, is_packed: bool) -> bool:
    """Whether each rank holds whole segments of every branch and attends alone.

    Zero keys fill the last segment up to w, which a rank alone does not know if it holds less. A
    pattern of blocks has no segments.
    """
    if not isinstance(pattern, DilatedPattern):
        return False
    if len(ranks) == 1:
        return True
    if is_packed or (pattern.padding == "attended" and not is_causal):
        return False
    seq_len = sum(num_positions(spans) for spans in ranks)
    lengths = [max(1, min(w, seq_len)) for w in pattern.segment_lengths]
    return all(len(spans) <= 1 for spans in ranks) and all(
        span.start % w == 0 for spans in ranks for span in spans for w in lengths
    )


class Choice(NamedTuple):
    """What a call sends that is not aligned.

    Attributes:
        kind: What.
        reason: Why, in words.
        traffic: Bytes, without masks.
    """

    kind: WayKind
    reason: str
    traffic: Traffic


def choose_exchange(kind: ExchangeKind, exchange: Exchange, ranks: Spans, sizes: Sizes) -> Choice:
    """What a call with `exchange=kind` sends: with "auto", the fewest bytes of all ranks.

    Bytes of forward and backward count. One decision serves all branches, because what all_to_all
    sends does not depend on how many there are.

    Raises:
        ValueError: If kind is "all_to_all" and there are fewer heads of k and v than ranks.
    """
    heads = exchange.heads
    if kind == "all_to_all":
        return Choice("heads", "as asked", traffic_of_heads(ranks, heads, sizes))
    rows = traffic_of_rows(exchange, sizes)
    if kind != "auto":
        return Choice("rows", "as asked", rows)
    if not rows.total:
        return Choice("rows", "no rows leave their rank", rows)
    if heads.num_kv_heads < len(ranks):
        few = f"{heads.num_kv_heads} heads of k and v are too few for all_to_all"
        return Choice("rows", f"{few} over {len(ranks)} ranks", rows)
    over_heads = traffic_of_heads(ranks, heads, sizes)
    is_cheaper = over_heads.total < rows.total
    reason = (
        f"forward and backward, all_to_all sends {format_bytes(over_heads.total)} and rows of k "
        f"and v are {format_bytes(rows.total)}"
    )
    return Choice("heads", reason, over_heads) if is_cheaper else Choice("rows", reason, rows)


def format_bytes(count: float) -> str:
    """Three digits and a unit: 12.3 MB."""
    units: Sequence[str] = ("B", "kB", "MB", "GB", "TB", "PB")
    for unit in units:
        if count < 999.5 or unit == units[-1]:
            return f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("the last unit takes every count")
