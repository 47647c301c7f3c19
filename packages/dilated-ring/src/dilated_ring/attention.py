"""Attention of local queries over the keys of all ranks: the public functions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.checks import check_integer
from dilated_core.inputs import cast_for_autocast, read_document_bounds

from dilated_ring.arguments import (
    Arguments,
    Options,
    check_arguments,
    describe,
    spans_of_lengths,
)
from dilated_ring.execution.call import (
    Call,
    Way,
    call_across,
    choose_way,
    run_call,
    run_on_two_levels,
    share_dropout_seed,
)
from dilated_ring.execution.uncompiled import uncompiled
from dilated_ring.layout import Layout, num_positions, spans_of_ranks
from dilated_ring.plan.exchange import ExchangeKind
from dilated_ring.plan.parcels import Heads
from dilated_ring.plan.sequences import Spans
from dilated_ring.sharding.group import Group, RankGroup, resolve_group
from dilated_ring.sharding.positions import positions_of
from dilated_ring.transport.agreement import check_agreement
from dilated_ring.transport.contract import Transport
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.errors import DisagreementError
from dilated_ring.transport.faults import reporting_failures
from dilated_ring.transport.in_process import InProcessTransport


def ring_dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    group: Group | tuple[Group, Group] = None,
    is_causal: bool = False,
    layout: Layout = "contiguous",
    exchange: ExchangeKind = "auto",
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    seq_len: int | None = None,
    backend: str = "auto",
    timeout_s: float | None = None,
    tile_size: int | None = None,
) -> torch.Tensor:
    """Dilated attention over a sequence that is cut over the ranks of a group.

    Equal to `dilated_core.dilated_attention` of the whole sequence, forward and backward, up to
    rounding. A rank sends the rows that a branch keeps of segments that reach into other ranks, to
    these ranks only; a branch whose segments end where shards end sends nothing. Every rank of the
    group makes the same calls in the same order, in one thread, and runs backward if any rank does.

    Example::

        # On each rank, with tensors (B, S, H, D) that all ranks have.
        q, k, v = (shard_sequence(x, dim=1) for x in (q, k, v))
        out = ring_dilated_attention(q, k, v, pattern, is_causal=True)
        whole = unshard_sequence(out, dim=1)

    Args:
        q: `(B, L, H, D)`, the L positions that this rank holds; `(L, H, D)` with `cu_seqlens`. L
            may differ between ranks and may be 0.
        k, v: `(B, L, H_kv, D)`, as for `dilated_core.dilated_attention`.
        pattern: Of the whole sequence.
        group: The ranks that share the sequence: a ProcessGroup, a DeviceMesh with a dimension
            "cp" or of one dimension, or None for all ranks. A pair (across, inside) of groups:
            heads are exchanged for positions inside a node, and `exchange` is for what goes across
            nodes; rank j inside node i holds part i · (size of inside) + j. Without
            torch.distributed, or in a group of one, this is `dilated_attention`.
        is_causal: Query i sees only the keys j ≤ i of the whole sequence.
        layout: `"contiguous"`: rank i holds the i-th part; parts may have any lengths.
            `"zigzag"`: as `shard_sequence` cuts, which balances causal attention.
        exchange: `"ring"`: rows travel from rank to rank while each computes. `"all_gather"`: each
            rank sends its rows to all that need them at once. `"all_to_all"`: each rank gets all
            positions of some heads. `"auto"`: the exchange that sends the fewest bytes; few rows
            go to all ranks that need them at once, many from rank to rank.
        scale, dropout_p: As for `dilated_attention`. What is dropped follows from the seed that
            rank 0 draws and from the positions in the whole sequence, as on one device.
        key_padding_mask: `(B, L)` bool, True for local keys that no query sees.
        cu_seqlens: `(N + 1,)`, the bounds of the documents of the *whole* sequence, the same on all
            ranks. Only documents that cross a border are exchanged.
        head_range: (first, total), if the tensors hold the heads from `first` on of `total`.
        seq_len: S, if `shard_sequence` cut the sequence. Then ranks neither exchange their lengths
            nor compare their arguments: after a mistake the other ranks raise `RankFailure`, at the
            latest after `timeout_s`, and the group is closed. None: ranks do both, by one small
            message for each pair of ranks.
        backend: As for `dilated_attention`.
        timeout_s: Seconds that a rank waits for another one; see `DistributedTransport`.
        tile_size: Positions of a tile, to work in tiles along a Hilbert curve; None: whole shards.
            Values differ by rounding only. See `HilbertRingAttention`.

    Returns:
        `(B, L, H, D)` in the dtype of q. It can be differentiated once.

    Raises:
        TypeError, ValueError: As for `dilated_attention`; if ranks disagree in an argument; if the
            lengths do not fit the layout; if `"all_to_all"` has fewer heads of k and v than ranks.
        RankFailure: If another rank failed or did not answer, with its number and the cause.
        RuntimeError: If two threads use one group at the same time.

    Source: arXiv 2307.02486, section 3.1, gathers kept rows; rings and layouts are this library's.
    """
    return ring_dilated_attention_with_lse(
        q, k, v, pattern, group=group, is_causal=is_causal, layout=layout, exchange=exchange,
        scale=scale, dropout_p=dropout_p, key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens, head_range=head_range, seq_len=seq_len, backend=backend,
        timeout_s=timeout_s, tile_size=tile_size,
    ).out  # fmt: skip


@uncompiled
def ring_dilated_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    group: Group | tuple[Group, Group] = None,
    is_causal: bool = False,
    layout: Layout = "contiguous",
    exchange: ExchangeKind = "auto",
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    seq_len: int | None = None,
    backend: str = "auto",
    timeout_s: float | None = None,
    tile_size: int | None = None,
) -> AttentionOutput:
    """`ring_dilated_attention` that also returns the log of the softmax denominators.

    Args, errors: As for `ring_dilated_attention`.

    Returns:
        `out` and `lse` `(B, L, H)`, as of `dilated_core.dilated_attention_with_lse`.
    """
    q, k, v = cast_for_autocast(q, k, v)
    arguments = (
        q, k, v, pattern, is_causal, layout, exchange, scale, dropout_p, key_padding_mask,
        cu_seqlens, head_range, backend, tile_size,
    )  # fmt: skip
    if isinstance(group, tuple):
        return _on_two_levels(group, arguments, seq_len, timeout_s)
    ranks = resolve_group(group)
    transport = _transport(ranks, timeout_s)
    options, lengths = _agree(transport, ranks, arguments, seq_len)
    with _own_mistakes(transport, seq_len):
        spans = spans_of_lengths(
            options.layout, ranks.size, ranks.rank, q.shape[-3], lengths, seq_len
        )
    call = _call(options, spans, q, k, cu_seqlens)
    way = choose_way(call, q, has_mask=key_padding_mask is not None)
    masks = None if key_padding_mask is None else [key_padding_mask]
    # Errors that all ranks raise alike were raised above; from here on, errors are this rank's.
    with reporting_failures(transport, ranks.rank):
        call = share_dropout_seed(call, (transport, ranks.rank))
        (result,) = _run(call, way, transport, [q], [k], [v], masks)
    return result


@uncompiled
def simulated_ring_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    ring_size: int,
    is_causal: bool = False,
    layout: Layout = "contiguous",
    exchange: ExchangeKind = "auto",
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    backend: str = "auto",
    tile_size: int | None = None,
) -> torch.Tensor:
    """Run `ring_size` ranks one after another in this process, without a process group.

    For tests and for trying a layout: steps and messages are those of real ranks, and the
    result is that of `dilated_core.dilated_attention` up to rounding. It saves no memory.

    Args:
        q, k, v, pattern: The whole sequence, as for `dilated_attention`.
        ring_size: How many ranks.
        is_causal, layout, exchange, scale, dropout_p, key_padding_mask, cu_seqlens, head_range,
            backend, tile_size: As for `ring_dilated_attention`, but the mask is that of the whole
            sequence.

    Returns:
        `(B, S, H, D)`, or `(T, H, D)` with `cu_seqlens`.

    Raises:
        TypeError, ValueError: As for `ring_dilated_attention`.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()
        >>> pattern = DilatedPattern([16, 64], [1, 4])
        >>> simulated_ring_attention(q, k, v, pattern, ring_size=3).shape
        torch.Size([1, 100, 4, 16])
    """
    check_integer("ring_size", ring_size, at_least=1)
    q, k, v = cast_for_autocast(q, k, v)
    options = check_arguments(
        q, k, v, pattern, is_causal, layout, exchange, scale, dropout_p, key_padding_mask,
        cu_seqlens, head_range, backend, tile_size,
    )  # fmt: skip
    dim = q.dim() - 3
    spans = spans_of_ranks(options.layout, q.shape[dim], ring_size)
    order = torch.cat([positions_of(held, q.device) for held in spans])
    lengths = [num_positions(held) for held in spans]

    def cut(x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        return list(torch.split(x.index_select(dim, order), lengths, dim))

    masks = None if key_padding_mask is None else cut(key_padding_mask, 1)
    shards = cut(q, dim), cut(k, dim), cut(v, dim)
    call = _call(options, spans, q, k, cu_seqlens)
    way = choose_way(call, q, has_mask=masks is not None)
    results = _run(call, way, InProcessTransport(ring_size), *shards, masks)
    out = torch.cat([result.out for result in results], dim)
    return out.index_select(dim, order.argsort())


def _on_two_levels(
    groups: tuple[Group, Group], arguments: Arguments, seq_len: int | None, timeout_s: float | None
) -> AttentionOutput:
    if len(groups) != 2:
        raise ValueError(
            f"group is a tuple of {len(groups)}; it must be a pair (across, inside) of groups."
        )
    across, inside = (resolve_group(group) for group in groups)
    near, far = _transport(inside, timeout_s), _transport(across, timeout_s)
    try:
        options, lengths = _agree(near, inside, arguments, seq_len)
        if options.exchange == "all_to_all":
            raise ValueError(
                "exchange is 'all_to_all' and group a pair of groups; heads are exchanged inside, "
                "so choose 'ring', 'all_gather' or 'auto' for what goes across."
            )
    except (TypeError, ValueError) as error:
        # The other nodes wait for this one.
        with reporting_failures(far, across.rank):
            if seq_len is not None:
                raise
            check_agreement(far, across.rank, {"arguments": str(error)}, 0)
        raise
    _, sizes = _agree(far, across, arguments, seq_len, local_len=inside.size)
    if lengths is not None and sizes is not None:
        lengths = _lengths_of_nodes(far, across, sizes, lengths)
    (q, k, v), (mask, cu_seqlens) = arguments[:3], arguments[9:11]
    size, rank = across.size * inside.size, across.rank * inside.size + inside.rank
    with _own_mistakes(far, seq_len), _own_mistakes(near, seq_len):
        spans = spans_of_lengths(options.layout, size, rank, q.shape[-3], lengths, seq_len)
    call = _call(options, spans, q, k, cu_seqlens)
    outer = call_across(call, inside.rank, inside.size)
    way = choose_way(outer, q, has_mask=mask is not None)
    if cu_seqlens is not None:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    with reporting_failures(far, across.rank), reporting_failures(near, inside.rank):
        outer = share_dropout_seed(outer, (near, inside.rank), (far, across.rank))
        result = run_on_two_levels(call, outer, way, near, far, q, k, v, mask)
    return result if cu_seqlens is None else AttentionOutput(result.out[0], result.lse[0])


def _transport(ranks: RankGroup, timeout_s: float | None) -> Transport:
    if ranks.process_group is None:
        return InProcessTransport(1)
    return DistributedTransport(ranks.process_group, timeout_s=timeout_s)


def _agree(
    transport: Transport,
    ranks: RankGroup,
    arguments: Arguments,
    seq_len: int | None,
    *,
    local_len: int | None = None,
) -> tuple[Options, list[int] | None]:
    """The options, and how many positions each rank holds unless `seq_len` is given.

    A rank with a mistake in its arguments takes part, so that all ranks raise it at once.
    """
    options, mistake = None, None
    try:
        options = check_arguments(*arguments)
        if seq_len is not None:
            check_integer("seq_len", seq_len, at_least=0)
        description = describe(options, *arguments[:3], *arguments[9:11])
        local_len = arguments[0].shape[-3] if local_len is None else local_len
    except (TypeError, ValueError) as error:
        mistake = error
        description = {"arguments": f"{type(error).__name__}: {error}"}
    lengths: list[int] | None = None
    if ranks.process_group is None:
        lengths = [local_len or 0]
    elif seq_len is None:
        with reporting_failures(transport, ranks.rank):
            lengths = check_agreement(transport, ranks.rank, description, local_len or 0)
    if options is None:
        assert mistake is not None
        with _own_mistakes(transport, seq_len):
            raise mistake
    return options, lengths


def _own_mistakes(transport: Transport, seq_len: int | None) -> AbstractContextManager[None]:
    """Report mistakes in arguments that the ranks do not compare.

    Where they compare them, all raise the same error and the group stays usable.
    """
    if seq_len is None:
        return nullcontext()
    return reporting_failures(transport, transport.hosted[0])


def _lengths_of_nodes(
    far: Transport, across: RankGroup, sizes: list[int], lengths: list[int]
) -> list[int]:
    """How many positions each rank holds, node by node, from the lengths of this node."""
    if len(set(sizes)) > 1:
        raise DisagreementError(
            f"the nodes have {sizes} ranks in their group inside; all must have as many."
        )
    with reporting_failures(far, across.rank):
        nodes = far.all_gather(across.rank, torch.tensor(lengths, device="cpu"))
    return [int(length) for node in nodes for length in node]


def _run(
    call: Call,
    way: Way,
    transport: Transport,
    q: list[torch.Tensor],
    k: list[torch.Tensor],
    v: list[torch.Tensor],
    masks: list[torch.Tensor] | None,
) -> list[AttentionOutput]:
    if call.bounds is None:
        return run_call(call, way, transport, q, k, v, masks)
    q, k, v = ([x.unsqueeze(0) for x in shards] for shards in (q, k, v))
    results = run_call(call, way, transport, q, k, v, masks)
    return [AttentionOutput(out[0], lse[0]) for out, lse in results]


def _call(
    options: Options,
    spans: Spans,
    q: torch.Tensor,
    k: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Call:
    seq_len = sum(num_positions(held) for held in spans)
    return Call(
        options.pattern,
        options.is_causal,
        options.scale,
        options.dropout_p,
        options.backend,
        int(torch.randint(2**62, (), device="cpu")) if options.dropout_p else 0,
        Heads(q.shape[-2], k.shape[-2], options.head_range),
        options.exchange,
        spans,
        seq_len,
        None if cu_seqlens is None else read_document_bounds(cu_seqlens, seq_len),
        options.tile_size,
    )
