"""A whole call over the ranks of one group: masks, documents, the way of exchange, the results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from dilated_core import (
    AttentionBackend,
    AttentionInputs,
    AttentionOptions,
    AttentionOutput,
    DilatedPattern,
    Span,
    choose_backend,
    dilated_attention_with_lse,
)
from dilated_core.dispatch import attend
from dilated_core.ops import Settings

from dilated_ring.execution.differentiable import attend_shards
from dilated_ring.execution.heads import Places, places, to_heads, to_positions
from dilated_ring.execution.padding import check_padding
from dilated_ring.execution.tasks import Shards, Work
from dilated_ring.layout import joined
from dilated_ring.plan.blocks import Pattern
from dilated_ring.plan.exchange import Exchange, ExchangeKind, plan_exchange, route_of
from dilated_ring.plan.parcels import Heads, parts_of_heads
from dilated_ring.plan.sequences import LocalDocuments, Spans, cut_sequences, local_documents
from dilated_ring.plan.traffic import Sizes, WayKind, choose_exchange, is_aligned
from dilated_ring.transport.contract import Transport
from dilated_ring.transport.in_process import InProcessTransport


class Call(NamedTuple):
    """The options of a call, the same on all ranks.

    Attributes:
        pattern: Of dilated attention, or of blocks.
        is_causal, scale, dropout_p, backend: As for `dilated_attention`, scale a number.
        dropout_seed: Of rank 0.
        heads: The heads of the tensors.
        exchange: How keys and queries of different ranks meet.
        ranks: The spans of positions that each rank holds.
        seq_len: S, all positions together.
        bounds: The documents, from 0 to S, on the CPU; None: one sequence.
        tile_size: As for `Work`. Documents of one rank are not cut into tiles.
    """

    pattern: Pattern
    is_causal: bool
    scale: float
    dropout_p: float
    backend: str
    dropout_seed: int
    heads: Heads
    exchange: ExchangeKind
    ranks: Spans
    seq_len: int
    bounds: torch.Tensor | None
    tile_size: int | None = None


class Way(NamedTuple):
    """How a call runs, the same on all ranks.

    Attributes:
        kind: What travels.
        exchange, backend: Of `"rows"`.
    """

    kind: WayKind
    exchange: Exchange | None = None
    backend: AttentionBackend | None = None


def choose_way(call: Call, q: torch.Tensor, *, has_mask: bool) -> Way:
    """Choose how the call runs: no messages are sent, and all ranks choose alike.

    Args:
        call: The options.
        q: `(B, L, H, D)`, or `(L, H, D)` with documents; of any rank.
        has_mask: Whether keys are masked.

    Raises:
        ValueError: If the backend cannot run it, or there are too few heads for `"all_to_all"`.
    """
    size = len(call.ranks)
    is_packed = call.bounds is not None
    # A packed q has no batch, and as many positions as this rank holds.
    batch_size = 1 if is_packed else q.shape[0]
    aligned = is_aligned(call.pattern, call.ranks, is_causal=call.is_causal, is_packed=is_packed)
    # A zigzag shard has positions that do not follow each other, by which dropout counts.
    needs_positions = call.dropout_p > 0 and size > 1
    is_empty = not batch_size and isinstance(call.pattern, DilatedPattern)
    if is_empty or (aligned and call.tile_size is None and not needs_positions):
        return Way("alone")
    exchange = plan_call(call, size)
    sizes = Sizes(batch_size, q.shape[-1], q.dtype.itemsize)
    choice = choose_exchange(call.exchange, exchange, call.ranks, sizes)
    if choice.kind == "heads" and call.tile_size is None:
        return Way("heads")
    return Way("rows", exchange, _choose_backend(call, q, call.heads, has_mask=has_mask))


def _choose_backend(
    call: Call, q: torch.Tensor, heads: Heads, *, has_mask: bool
) -> AttentionBackend:
    """The backend for rows of some ranks with keys of others."""
    inputs = AttentionInputs(
        q.device,
        q.dtype,
        heads.num_heads,
        q.shape[-1],
        dropout_p=call.dropout_p,
        num_kv_heads=heads.num_kv_heads,
        has_key_padding_mask=has_mask,
        is_rectangular=True,
    )
    return choose_backend(call.backend, inputs)


def share_dropout_seed(call: Call, *ranks: tuple[Transport, int]) -> Call:
    """The call with the seed of the first rank: the ranks of a group are seeded as users like.

    Args:
        call: The options of this rank.
        ranks: A transport and the rank in it; with several, the first rank of the first ranks.
    """
    if not call.dropout_p:
        return call
    seed = torch.tensor(call.dropout_seed, device="cpu")
    for transport, rank in ranks:
        seed = transport.all_gather(rank, seed)[0]
    return call._replace(dropout_seed=int(seed))


def run_call(
    call: Call,
    way: Way,
    transport: Transport,
    q: Shards,
    k: Shards,
    v: Shards,
    masks: Shards | None,
) -> list[AttentionOutput]:
    """The results of each hosted rank, differentiable.

    Args:
        call: The options.
        way: Of `choose_way`.
        transport: Between the ranks.
        q, k, v: `(B, L, H, D)` and `(B, L, H_kv, D)` for each hosted rank; B is 1 with documents.
        masks: `(B, L)` for each hosted rank, True for keys to ignore; None: no mask.
    """
    if way.kind == "alone":
        return _each_rank_alone(call, q, k, v, masks)
    hidden = None if masks is None else _gather_masks(call, transport, masks)
    if hidden is not None and not isinstance(call.pattern, DilatedPattern):
        check_padding(call.pattern, hidden)
    if way.kind == "heads":
        return _over_heads(call, transport, q, k, v, hidden)
    assert way.exchange is not None
    assert way.backend is not None
    options = AttentionOptions(False, call.scale, call.dropout_p, call.dropout_seed)
    work = Work(way.exchange, options, way.backend, transport, hidden, call.tile_size)
    if call.bounds is None or not isinstance(call.pattern, DilatedPattern):
        return attend_shards(work, q, k, v)
    return _with_local_documents(call, work, q, k, v)


def call_across(call: Call, rank: int, size: int) -> Call:
    """The call of one rank over nodes, of `size` ranks each, once its node has exchanged heads.

    Raises:
        ValueError: If there are fewer heads of k and v than ranks in a node.
    """
    heads = call.heads
    queries, keys = parts_of_heads(heads.num_heads, heads.num_kv_heads, size)[rank]
    first, total = heads.head_range
    mine = Heads(
        queries.stop - queries.start, keys.stop - keys.start, (first + queries.start, total)
    )
    nodes = tuple(
        joined([span for held in call.ranks[i : i + size] for span in held])
        for i in range(0, len(call.ranks), size)
    )
    return call._replace(ranks=nodes, heads=mine)


def run_on_two_levels(
    call: Call,
    across_call: Call,
    way: Way,
    inside: Transport,
    across: Transport,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
) -> AttentionOutput:
    """Heads for positions inside a node, then keys to queries across nodes; differentiable.

    Rank number i·n + j of `call.ranks` is rank i of `across` and rank j of `inside`, which has n.
    `across_call` is that of `call_across`, and `way` its way.
    """
    (i,) = across.hosted
    n = inside.size
    heads = call.heads
    parts = parts_of_heads(heads.num_heads, heads.num_kv_heads, n)
    q_parts, kv_parts = [part for part, _ in parts], [part for _, part in parts]
    where = places(call.ranks[i * n : (i + 1) * n])
    queries, keys, values = to_heads(inside, where, (q_parts, kv_parts, kv_parts), ([q], [k], [v]))
    masks = None if mask is None else [_all_positions(inside, where, [mask])]
    (result,) = run_call(across_call, way, across, queries, keys, values, masks)
    (out,), (lse,) = to_positions(inside, where, (q_parts, q_parts), ([result.out], [result.lse]))
    return AttentionOutput(out, lse)


def _each_rank_alone(
    call: Call, q: Shards, k: Shards, v: Shards, masks: Shards | None
) -> list[AttentionOutput]:
    """Attention within each shard: any backend runs, also one with the whole pattern."""
    results: list[AttentionOutput] = []
    for number, tensors in enumerate(zip(q, k, v, strict=True)):
        results.append(
            _attend(call, tensors, call.bounds, None if masks is None else masks[number])
        )
    return results


def _attend(
    call: Call,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bounds: torch.Tensor | None,
    hidden: torch.Tensor | None = None,
    first_head: int = 0,
    first_position: int = 0,
) -> AttentionOutput:
    """Attention on one device, of tensors with a batch of 1 if packed.

    `first_position`: Of the tensors, among the positions of all ranks.
    """
    first, total = call.heads.head_range
    q, k, v = tensors
    heads = Heads(q.shape[2], k.shape[2], (first + first_head, total))
    if not isinstance(call.pattern, DilatedPattern):
        return _attend_to_blocks(call, heads, tensors, hidden)
    if call.dropout_p:
        # A backend for rectangles drops by the numbers of rows, and others by rules of their own.
        backend = _choose_backend(call, q, heads, has_mask=hidden is not None)
        settings = Settings(
            call.pattern,
            call.is_causal,
            call.scale,
            call.dropout_p,
            heads.head_range,
            None,
            backend,
        )
        seed = torch.tensor([call.dropout_seed, first_position], device="cpu")
        return AttentionOutput(*attend(q, k, v, settings, seed, hidden, bounds))
    if bounds is not None:
        q, k, v = q[0], k[0], v[0]
    result = dilated_attention_with_lse(
        q,
        k,
        v,
        call.pattern,
        is_causal=call.is_causal,
        scale=call.scale,
        key_padding_mask=hidden,
        cu_seqlens=bounds,
        head_range=heads.head_range,
        backend=call.backend,
    )
    if bounds is None:
        return result
    return AttentionOutput(result.out.unsqueeze(0), result.lse.unsqueeze(0))


def _attend_to_blocks(
    call: Call,
    heads: Heads,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor | None,
) -> AttentionOutput:
    """Some heads of all positions over their blocks: what a ring of one rank does."""
    q, k, v = tensors
    alone = call._replace(heads=heads, ranks=(joined([Span(0, call.seq_len)]),))
    options = AttentionOptions(False, call.scale, call.dropout_p, call.dropout_seed)
    backend = _choose_backend(alone, q, heads, has_mask=hidden is not None)
    work = Work(plan_call(alone, 1), options, backend, InProcessTransport(1), hidden)
    (result,) = attend_shards(work, [q], [k], [v])
    return result


def plan_call(call: Call, size: int) -> Exchange:
    """What travels if keys go to queries."""
    bounds = None if call.bounds is None else _numbers(call.bounds)
    is_cut_only = isinstance(call.pattern, DilatedPattern)
    return plan_exchange(
        call.pattern,
        call.heads,
        cut_sequences(call.ranks, call.seq_len, bounds, is_cut_only=is_cut_only),
        size=size,
        is_causal=call.is_causal,
        route=route_of(call.exchange),
    )


def _over_heads(
    call: Call,
    transport: Transport,
    q: Shards,
    k: Shards,
    v: Shards,
    hidden: torch.Tensor | None,
) -> list[AttentionOutput]:
    """Each rank attends with some heads over all positions."""
    heads = call.heads
    parts = parts_of_heads(heads.num_heads, heads.num_kv_heads, transport.size)
    q_parts, kv_parts = [part for part, _ in parts], [part for _, part in parts]
    where = places(call.ranks)
    queries, keys, values = to_heads(transport, where, (q_parts, kv_parts, kv_parts), (q, k, v))
    results = [
        _attend(call, tensors, call.bounds, hidden, q_parts[rank].start)
        for rank, tensors in zip(
            transport.hosted, zip(queries, keys, values, strict=True), strict=True
        )
    ]
    outs, lses = to_positions(
        transport, where, (q_parts, q_parts), list(zip(*results, strict=True))
    )
    return [AttentionOutput(*pair) for pair in zip(outs, lses, strict=True)]


def _gather_masks(call: Call, transport: Transport, masks: Shards) -> torch.Tensor:
    """`(B, S)`: the mask of all positions, one byte for each."""
    return _all_positions(transport, places(call.ranks), masks)


def _all_positions(transport: Transport, where: Places, masks: Shards) -> torch.Tensor:
    # With one head that every rank gets, this is what gathering positions does.
    x = [mask.to(torch.uint8).unsqueeze(-1) for mask in masks]
    ((gathered, *_),) = to_heads(transport, where, [[slice(0, 1)] * transport.size], [x])
    return gathered.squeeze(-1).bool()


def _with_local_documents(
    call: Call, work: Work, q: Shards, k: Shards, v: Shards
) -> list[AttentionOutput]:
    """Documents that cross borders over the exchange, and the others where they are."""
    assert call.bounds is not None
    exchange = work.exchange
    crossing: Sequence[AttentionOutput | None] = [None] * len(q)
    if exchange.sequences:
        crossing = attend_shards(work, q, k, v)
    results: list[AttentionOutput] = []
    bounds = _numbers(call.bounds)
    for rank, over_ranks, *qkv in zip(work.transport.hosted, crossing, q, k, v, strict=True):
        tensors = (qkv[0], qkv[1], qkv[2])
        parts: list[tuple[int, AttentionOutput]] = []
        for documents in local_documents(call.ranks[rank], bounds):
            parts.append((documents.at, _attend_locally(call, documents, *tensors)))
        if over_ranks is not None:
            for sequence in exchange.sequences:
                for piece in sequence.pieces[rank]:
                    rows = piece.rows
                    part = AttentionOutput(over_ranks.out[:, rows], over_ranks.lse[:, rows])
                    parts.append((piece.at, part))
        if not parts:
            # No positions, but a result that backward runs through, as on the other ranks.
            parts.append((0, _attend(call, tensors, call.bounds.new_zeros(2))))
        parts.sort(key=lambda part: part[0])
        outs, lses = zip(*(part for _, part in parts), strict=True)
        results.append(AttentionOutput(torch.cat(outs, 1), torch.cat(lses, 1)))
    return results


def _numbers(bounds: torch.Tensor) -> list[int]:
    return bounds.tolist()  # pyright: ignore[reportUnknownVariableType]


def _attend_locally(
    call: Call, documents: LocalDocuments, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> AttentionOutput:
    assert call.bounds is not None
    bounds = call.bounds[documents.bounds.start : documents.bounds.stop]
    first = int(bounds[0])
    bounds = bounds - first
    rows = slice(documents.at, documents.at + int(bounds[-1]))
    return _attend(call, (q[:, rows], k[:, rows], v[:, rows]), bounds, first_position=first)
