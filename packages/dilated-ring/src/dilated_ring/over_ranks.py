"""A call of attention over the ranks of a group, or of one process: for all kinds of patterns."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.checks import check_integer
from dilated_core.inputs import read_document_bounds

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
from dilated_ring.layout import num_positions, spans_of_ranks
from dilated_ring.plan.blocks import check_length
from dilated_ring.plan.parcels import Heads
from dilated_ring.plan.sequences import Spans
from dilated_ring.sharding.group import Group, RankGroup, resolve_group, resolve_pair
from dilated_ring.sharding.positions import positions_of
from dilated_ring.transport.agreement import check_agreement
from dilated_ring.transport.contract import Transport
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.errors import DisagreementError
from dilated_ring.transport.faults import reporting_failures
from dilated_ring.transport.in_process import InProcessTransport


def attend_over_ranks(
    arguments: Arguments,
    group: Group | tuple[Group, Group],
    seq_len: int | None,
    timeout_s: float | None,
) -> AttentionOutput:
    """The results of this rank; see `ring_dilated_attention` for arguments and errors."""
    if isinstance(group, tuple):
        return _on_two_levels(group, arguments, seq_len, timeout_s)
    (q, k, v), key_padding_mask, cu_seqlens = arguments[:3], arguments[9], arguments[10]
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


def attend_in_process(arguments: Arguments, ring_size: int) -> torch.Tensor:
    """The results of `ring_size` ranks in this process, as one tensor of the whole sequence."""
    check_integer("ring_size", ring_size, at_least=1)
    options = check_arguments(*arguments)
    (q, k, v), key_padding_mask, cu_seqlens = arguments[:3], arguments[9], arguments[10]
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
    across, inside = resolve_pair(groups)
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
    bounds = None if cu_seqlens is None else read_document_bounds(cu_seqlens, seq_len)
    if not isinstance(options.pattern, DilatedPattern):
        documents: list[int] | None = None if bounds is None else bounds.tolist()  # pyright: ignore
        check_length(options.pattern, seq_len, documents)
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
        bounds,
        options.tile_size,
    )
