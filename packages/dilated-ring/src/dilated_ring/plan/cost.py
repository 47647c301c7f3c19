"""What a call over ranks sends and computes, without running it: `exchange_plan`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple, cast, get_args

import torch
from dilated_core import DilatedPattern, Span
from dilated_core.checks import (
    check_bool,
    check_choice,
    check_head_groups,
    check_head_range,
    check_integer,
)

from dilated_ring.layout import LAYOUTS, Layout, num_positions, spans_of_ranks
from dilated_ring.plan.blocks import (
    BlocksForLength,
    KeptBlocks,
    Pattern,
    check_length,
    checked_blocks,
)
from dilated_ring.plan.exchange import Exchange, ExchangeKind, plan_exchange, route_of
from dilated_ring.plan.pairs import pairs_of_ranks, pairs_over_heads
from dilated_ring.plan.parcels import Heads, parts_of_heads
from dilated_ring.plan.sequences import cut_sequences
from dilated_ring.plan.table import plan_table
from dilated_ring.plan.traffic import (
    Sizes,
    Traffic,
    WayKind,
    choose_exchange,
    gathering_bytes,
    is_aligned,
    mask_bytes,
)


class RankPlan(NamedTuple):
    """What one rank holds, sends and computes.

    Attributes:
        positions: The spans of positions that it holds.
        forward_bytes, backward_bytes: What it sends; masks in forward.
        forward_flops, backward_flops: Of its matrix products, counted as `DilatedPattern.flops`.
        peers: How many ranks it sends to in forward, masks apart.
    """

    positions: tuple[Span, ...]
    forward_bytes: int
    backward_bytes: int
    forward_flops: int
    backward_flops: int
    peers: int

    @property
    def num_positions(self) -> int:
        """How many positions it holds."""
        return num_positions(self.positions)


class BranchPlan(NamedTuple):
    """What one branch sends in forward.

    Attributes:
        segment_length, dilation_rate: The branch.
        is_local: No segment of it makes a rank send rows.
        forward_bytes: Of all ranks; 0 if heads are exchanged, which serves all branches at once.
    """

    segment_length: int
    dilation_rate: int
    is_local: bool
    forward_bytes: int


class Message(NamedTuple):
    """Rows that one rank sends to another in a step.

    Attributes:
        step: Counted from 0.
        source, destination: The ranks.
        owner: The rank that holds the rows; not the source where rows are passed on.
        branch: Number of the branch; None if heads are exchanged, and for a pattern of blocks.
        positions: Of the whole sequence, among which the rows lie.
        num_bytes: Of k and v together, or of all tensors if heads are exchanged.
    """

    step: int
    source: int
    destination: int
    owner: int
    branch: int | None
    positions: Span
    num_bytes: int


@dataclass(frozen=True)
class ExchangePlan:
    """The costs of one attention call over ranks; `print` it for tables.

    Attributes:
        pattern, seq_len, cp_size, layout, exchange, is_causal: Of the call.
        way: `"alone"`: each rank holds whole segments, and nothing is sent. `"rows"`: rows of k and
            v go to queries. `"heads"`: each rank gets all positions of some heads (all_to_all).
        reason: Why, in words.
        num_hops: Steps in which rows travel one after another; 2 if heads are exchanged.
        ranks: What each rank does.
        branches: What each branch sends; none for a pattern of blocks.
        gathering_bytes: What each rank would send in forward if all gathered the whole k and v.
    """

    pattern: DilatedPattern | KeptBlocks | BlocksForLength
    seq_len: int
    cp_size: int
    layout: Layout
    exchange: ExchangeKind
    is_causal: bool
    way: WayKind
    reason: str
    num_hops: int
    ranks: tuple[RankPlan, ...]
    branches: tuple[BranchPlan, ...]
    gathering_bytes: tuple[int, ...]
    _rows: Exchange = field(repr=False, compare=False)
    _heads: Heads = field(repr=False, compare=False)
    _sizes: Sizes = field(repr=False, compare=False)

    @property
    def forward_bytes(self) -> int:
        """What all ranks send in forward."""
        return sum(rank.forward_bytes for rank in self.ranks)

    @property
    def backward_bytes(self) -> int:
        """What all ranks send in backward."""
        return sum(rank.backward_bytes for rank in self.ranks)

    @property
    def balance(self) -> float:
        """Mean over largest FLOPs of the ranks: 1 if all have equally much to do."""
        flops = [rank.forward_flops for rank in self.ranks]
        return sum(flops) / (self.cp_size * max(flops)) if any(flops) else 1.0

    @property
    def share_of_gathering(self) -> float:
        """Bytes of forward over those of gathering the whole k and v; 0 on one rank."""
        return self.forward_bytes / (sum(self.gathering_bytes) or 1)

    def messages(self, step: int) -> Iterator[Message]:
        """What is sent in a step of forward, by source, destination and position; masks apart.

        Where rows go to queries, backward sends these messages once more, and gradients back.

        Raises:
            ValueError: If there is no such step.
        """
        if check_integer("step", step, at_least=0) >= self.num_hops:
            raise ValueError(f"step is {step}; there are {self.num_hops} hops, counted from 0.")
        return (
            self._messages_of_heads(step) if self.way == "heads" else self._messages_of_rows(step)
        )

    def _messages_of_rows(self, step: int) -> Iterator[Message]:
        row = self._sizes.batch_size * self._sizes.head_dim * self._sizes.itemsize
        of_blocks = not isinstance(self._rows.pattern, DilatedPattern)
        for source, destination, numbers in self._rows.moves[step]:
            for number in numbers:
                parcel = self._rows.parcels[number]
                branch = None if of_blocks else parcel.branch
                start = self._rows.sequences[parcel.sequence].start
                span = Span(*(start + x for x in parcel.positions))
                size = parcel.num_rows_of_head_dim * row
                yield Message(step, source, destination, parcel.owner, branch, span, size)

    def _messages_of_heads(self, step: int) -> Iterator[Message]:
        B, D, itemsize = self._sizes
        parts = parts_of_heads(self._heads.num_heads, self._heads.num_kv_heads, self.cp_size)
        for source, rank in enumerate(self.ranks):
            for destination, other in enumerate(self.ranks):
                if destination == source:
                    continue
                # First q, k and v of the other's heads; then out and lse of the other's positions.
                q_part, kv_part = parts[destination] if step == 0 else parts[source]
                q_heads, kv_heads = (part.stop - part.start for part in (q_part, kv_part))
                row = (q_heads + 2 * kv_heads) * D * itemsize
                if step == 1:
                    row = q_heads * (D * itemsize + self._sizes.wide_itemsize)
                for span in (rank if step == 0 else other).positions:
                    size = B * span.length * row
                    yield Message(step, source, destination, source, None, span, size)

    def hop_bytes(self, step: int) -> tuple[int, ...]:
        """What each rank sends in a step of forward, masks apart."""
        sent = [0] * self.cp_size
        for message in self.messages(step):
            sent[message.source] += message.num_bytes
        return tuple(sent)

    def __str__(self) -> str:
        return plan_table(self)


def exchange_plan(
    pattern: DilatedPattern | KeptBlocks | BlocksForLength,
    seq_len: int,
    cp_size: int,
    layout: Layout = "contiguous",
    *,
    exchange: ExchangeKind = "auto",
    num_heads: int = 8,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype | int = torch.bfloat16,
    batch_size: int = 1,
    is_causal: bool = False,
    cu_seqlens: Sequence[int] | torch.Tensor | None = None,
    has_key_padding_mask: bool = False,
    head_range: tuple[int, int] | None = None,
    block_size: int | None = None,
) -> ExchangePlan:
    """What `ring_dilated_attention` sends and computes: pure Python, for any length and any number.

    With a pattern of blocks, what `ring_block_sparse_attention` does.

    Bytes are those that the transport sends for the same call. Backward is that of `out`, with
    gradients of q, k and v. A billion positions over 1,024 ranks take a few seconds.

    Example:
        >>> plan = exchange_plan(DilatedPattern([2048, 65536], [1, 32]), 262_144, 8)
        >>> [(branch.segment_length, branch.is_local) for branch in plan.branches]
        [(2048, True), (65536, False)]
        >>> plan.num_hops, f"{plan.share_of_gathering:.4f}"  # 2 ranks share a segment
        (1, '0.0045')

    Args:
        pattern: Of the whole sequence.
        seq_len: S, in positions, cut as `shard_sequence` cuts.
        cp_size: How many ranks share the sequence.
        layout, exchange, is_causal: As for `ring_dilated_attention`.
        num_heads, num_kv_heads, head_dim: H, H_kv and D. Default of H_kv: H.
        dtype: Of q, k and v; or bytes of a number.
        batch_size: B; 1 with documents.
        cu_seqlens: Bounds of documents, from 0 to S; None: one sequence.
        has_key_padding_mask: Whether the call has one. Masks go to all ranks, a byte a position.
        head_range: (first, total), if the tensors hold the heads from `first` on of `total`.
        block_size: As for `ring_block_sparse_attention`; None with a DilatedPattern.

    Raises:
        TypeError, ValueError: If an argument is wrong; if `"all_to_all"` has fewer heads of k and v
            than ranks.
    """
    kept = _checked(pattern, block_size)
    check_integer("seq_len", seq_len, at_least=0)
    check_integer("cp_size", cp_size, at_least=1)
    check_choice("layout", layout, LAYOUTS)
    check_choice("exchange", exchange, get_args(ExchangeKind))
    check_integer("num_heads", num_heads, at_least=1)
    num_kv_heads = check_head_groups(num_heads, num_kv_heads)
    check_integer("head_dim", head_dim, at_least=1)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else dtype
    check_integer("dtype, as bytes of a number", itemsize, at_least=1)
    check_integer("batch_size", batch_size, at_least=1)
    check_bool("is_causal", is_causal)
    check_bool("has_key_padding_mask", has_key_padding_mask)
    bounds = None if cu_seqlens is None else _check_bounds(cu_seqlens, seq_len)
    if bounds is not None and (batch_size > 1 or has_key_padding_mask):
        raise ValueError(
            "cu_seqlens is given with a batch or a key padding mask; packed documents have neither."
        )
    heads = Heads(num_heads, num_kv_heads, check_head_range(head_range, num_heads))
    if not isinstance(kept, DilatedPattern):
        check_length(kept, seq_len, bounds)
    sizes = Sizes(batch_size, head_dim, itemsize)
    spans = spans_of_ranks(layout, seq_len, cp_size)
    rows = plan_exchange(
        kept,
        heads,
        cut_sequences(spans, seq_len, bounds, is_cut_only=isinstance(kept, DilatedPattern)),
        size=cp_size,
        is_causal=is_causal,
        route=route_of(exchange),
    )
    nothing = (0,) * cp_size
    if is_aligned(kept, spans, is_causal=is_causal, is_packed=bounds is not None):
        reason = "each rank holds whole segments" if cp_size > 1 else "one rank holds everything"
        way, traffic = "alone", Traffic(nothing, nothing)
    else:
        way, reason, traffic = choose_exchange(exchange, rows, spans, sizes)
    pairs = (pairs_over_heads if way == "heads" else pairs_of_ranks)(
        kept, heads, spans, seq_len, bounds, is_causal=is_causal
    )
    has_masks = has_key_padding_mask and way != "alone"
    masks = mask_bytes(spans, batch_size) if has_masks else nothing
    peers = [cp_size - 1] * cp_size if way == "heads" else _peers(rows)
    per_pair = batch_size * head_dim
    ranks = tuple(
        RankPlan(held, mask + sent, back, 4 * per_pair * n, 10 * per_pair * n, others)
        for held, mask, sent, back, n, others in zip(
            spans, masks, *traffic, pairs, peers, strict=True
        )
    )
    hops = 2 if way == "heads" else rows.num_steps
    return ExchangePlan(
        pattern, seq_len, cp_size, layout, exchange, is_causal, way, reason,
        hops, ranks, _branches(rows, sizes, way),
        gathering_bytes(spans, heads, sizes), rows, heads, sizes,
    )  # fmt: skip


def _check_bounds(cu_seqlens: Sequence[int] | torch.Tensor, seq_len: int) -> tuple[int, ...]:
    values = (
        cast(list[int], cu_seqlens.tolist()) if isinstance(cu_seqlens, torch.Tensor) else cu_seqlens
    )
    bounds = tuple(check_integer("an entry of cu_seqlens", x, at_least=0) for x in values)
    is_ascending = all(a <= b for a, b in pairwise(bounds))
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != seq_len or not is_ascending:
        raise ValueError(
            f"cu_seqlens must ascend from 0 to seq_len, here {seq_len}, with an entry for each "
            f"document's begin and one for the last one's end."
        )
    return bounds


def _checked(
    pattern: DilatedPattern | KeptBlocks | BlocksForLength, block_size: int | None
) -> Pattern:
    """The pattern that plans are made of.

    Raises:
        TypeError, ValueError: If `block_size` and the kind of pattern do not fit together.
    """
    if not isinstance(pattern, DilatedPattern):
        return checked_blocks(pattern, block_size)
    if block_size is not None:
        raise ValueError(
            f"block_size is {block_size} and pattern a DilatedPattern, which has no blocks; leave "
            f"out block_size, or pass a pattern of blocks."
        )
    return pattern


def _peers(rows: Exchange) -> list[int]:
    """How many ranks each rank sends rows to."""
    to: list[set[int]] = [set() for _ in range(rows.size)]
    for parcel in rows.parcels:
        if rows.is_relayed(parcel):
            for source, user in pairwise((parcel.owner, *parcel.users)):
                to[source].add(user)
        else:
            to[parcel.owner].update(parcel.users)
    return [len(peers) for peers in to]


def _branches(rows: Exchange, sizes: Sizes, way: WayKind) -> tuple[BranchPlan, ...]:
    if not isinstance(rows.pattern, DilatedPattern):
        return ()
    sent = [0] * len(rows.pattern.branches)
    travels = [False] * len(sent)
    for parcel in rows.parcels:
        travels[parcel.branch] = True
        sent[parcel.branch] += parcel.num_rows_of_head_dim * len(parcel.users)
    row = 0 if way == "heads" else sizes.batch_size * sizes.head_dim * sizes.itemsize
    return tuple(
        BranchPlan(w, rate, not travels[i], sent[i] * row)
        for i, (w, rate) in enumerate(rows.pattern.branches)
    )
