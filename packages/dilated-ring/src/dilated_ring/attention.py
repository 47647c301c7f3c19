"""Attention of local queries over the keys of all ranks: the public functions."""

from __future__ import annotations

import torch
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.inputs import cast_for_autocast

from dilated_ring.layout import Layout
from dilated_ring.over_ranks import attend_in_process, attend_over_ranks
from dilated_ring.plan.exchange import ExchangeKind
from dilated_ring.sharding.group import Group
from dilated_ring.uncompiled import uncompiled


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
    return attend_over_ranks(arguments, group, seq_len, timeout_s)


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
    q, k, v = cast_for_autocast(q, k, v)
    arguments = (
        q, k, v, pattern, is_causal, layout, exchange, scale, dropout_p, key_padding_mask,
        cu_seqlens, head_range, backend, tile_size,
    )  # fmt: skip
    return attend_in_process(arguments, ring_size)
