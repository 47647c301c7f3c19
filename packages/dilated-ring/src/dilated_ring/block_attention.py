"""Block-sparse attention of local queries over the keys of all ranks: the public functions."""

from __future__ import annotations

import torch
from dilated_core import AttentionOutput
from dilated_core.inputs import cast_for_autocast

from dilated_ring.arguments import BlockArguments
from dilated_ring.layout import Layout
from dilated_ring.over_ranks import attend_in_process, attend_over_ranks
from dilated_ring.plan.blocks import BlocksForLength, KeptBlocks
from dilated_ring.plan.exchange import ExchangeKind
from dilated_ring.sharding.group import Group
from dilated_ring.uncompiled import uncompiled


def ring_block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: KeptBlocks | BlocksForLength,
    block_size: int | None = None,
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
) -> torch.Tensor:
    """Block-sparse attention over a sequence that is cut over the ranks of a group.

    Equal to `dilated_sparse.block_sparse_attention` of the whole sequence, forward and backward, up
    to rounding: one softmax per query over the keys of all blocks that its row keeps. A rank sends
    the blocks that rows of other ranks keep, to these ranks only. Steps in which no rank needs a
    block do not take place.

    Example::

        # On each rank, with tensors (B, S, H, D) that all ranks have, of 16 blocks.
        q, k, v = (shard_sequence(x, dim=1) for x in (q, k, v))
        pattern = dilated_sparse.local_window(16, window=2)
        out = ring_block_sparse_attention(q, k, v, pattern, block_size=64, is_causal=True)
        whole = unshard_sequence(out, dim=1)

    Args:
        q: `(B, L, H, D)`, the L positions that this rank holds; `(L, H, D)` with `cu_seqlens`. L
            may differ between ranks and may be 0.
        k, v: `(B, L, H_kv, D)`; H_kv divides H.
        pattern: The kept blocks of the whole sequence, ⌈S / block_size⌉ in each direction: a
            `dilated_sparse.BlockPattern`, or anything with `num_blocks`, `num_heads` and `rows()`,
            see `KeptBlocks`. It lists one head, which all share, or a number that divides the
            heads. Or what builds a pattern for each length: a
            `dilated_sparse.SparsePatternConfig`, or anything with `pattern_for`.
        block_size: Positions of a block; None: that of `pattern` if it has one, else 64. Shards may
            begin and end inside a block.
        is_causal: Query i sees only the keys j ≤ i of the whole sequence.
        key_padding_mask: `(B, L)` bool, True for local keys that no query sees. Padding must be
            behind a sequence, since one device counts the blocks of a batch row from its first
            visible key; and if `pattern` follows the length, holes only.
        cu_seqlens: `(M + 1,)`, the bounds of the documents of the *whole* sequence, the same on all
            ranks. Blocks are counted from the first position of each document, which takes the
            first rows and columns of the pattern, or the pattern of its own length.
        group, layout, exchange, scale, dropout_p, head_range, seq_len, backend, timeout_s: As for
            `ring_dilated_attention`.

    Returns:
        `(B, L, H, D)` in the dtype of q. It can be differentiated once.

    Raises:
        TypeError, ValueError: As for `ring_dilated_attention`; if the pattern is for another number
            of blocks or heads, or a row keeps no block that its queries see.
        RankFailure: If another rank failed or did not answer, with its number and the cause.
        RuntimeError: If two threads use one group at the same time.
    """
    return ring_block_sparse_attention_with_lse(
        q, k, v, pattern, block_size, group=group, is_causal=is_causal, layout=layout,
        exchange=exchange, scale=scale, dropout_p=dropout_p, key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens, head_range=head_range, seq_len=seq_len, backend=backend,
        timeout_s=timeout_s,
    ).out  # fmt: skip


@uncompiled
def ring_block_sparse_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: KeptBlocks | BlocksForLength,
    block_size: int | None = None,
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
) -> AttentionOutput:
    """`ring_block_sparse_attention` that also returns the log of the softmax denominators.

    Args, errors: As for `ring_block_sparse_attention`.

    Returns:
        `out` and `lse` `(B, L, H)`, float32 (float64 for float64 inputs). Gradients flow through
        both.
    """
    q, k, v = cast_for_autocast(q, k, v)
    arguments = (
        q, k, v, BlockArguments(pattern, block_size), is_causal, layout, exchange, scale, dropout_p,
        key_padding_mask, cu_seqlens, head_range, backend, None,
    )  # fmt: skip
    return attend_over_ranks(arguments, group, seq_len, timeout_s)


@uncompiled
def simulated_ring_block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: KeptBlocks | BlocksForLength,
    block_size: int | None = None,
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
) -> torch.Tensor:
    """`simulated_ring_attention` over a pattern of blocks: `ring_size` ranks in this process.

    Args:
        q, k, v: The whole sequence.
        ring_size: How many ranks.
        pattern, block_size: As for `ring_block_sparse_attention`.
        is_causal, layout, exchange, scale, dropout_p, key_padding_mask, cu_seqlens, head_range,
            backend: As there, but the mask is that of the whole sequence.

    Returns:
        `(B, S, H, D)`, or `(T, H, D)` with `cu_seqlens`.

    Raises:
        TypeError, ValueError: As for `ring_block_sparse_attention`.
    """
    q, k, v = cast_for_autocast(q, k, v)
    arguments = (
        q, k, v, BlockArguments(pattern, block_size), is_causal, layout, exchange, scale, dropout_p,
        key_padding_mask, cu_seqlens, head_range, backend, None,
    )  # fmt: skip
    return attend_in_process(arguments, ring_size)
