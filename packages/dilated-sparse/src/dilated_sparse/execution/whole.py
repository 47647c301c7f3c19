"""Hand whole sequences to a backend that walks lists of blocks itself, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from dilated_core import AttentionOptions, AttentionOutput, Gradients
from dilated_core.backends.contract import BlockLists
from dilated_core.dropout import DropoutRows
from dilated_core.merge import accumulation_dtype

from dilated_sparse.execution.run import Call
from dilated_sparse.pattern.blocks import BlockPattern


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> AttentionOutput:
    """As `run.forward`, by a `BlockSparseBackend`."""
    # No sequence has the padding.
    new: Any = torch.empty if call.options.key_padding_mask is None else torch.zeros
    out = new(q.shape, dtype=q.dtype, device=q.device)
    lse = q.new_full(q.shape[:-1], -math.inf, dtype=accumulation_dtype(q.dtype))
    backend: Any = call.backend
    for at, blocks, options in _sequences(call, q, cu_seqlens):
        out[at], lse[at] = backend.block_sparse_forward(q[at], k[at], v[at], blocks, options)
    return AttentionOutput(out, lse)


def backward(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> Gradients:
    """As `run.backward`, by a `BlockSparseBackend`."""
    wide = accumulation_dtype(q.dtype)
    delta = (dout.to(wide) * out.to(wide)).sum(-1)
    delta = delta if dlse is None else delta - dlse
    # A row that sees no key at all: exp(score − ∞) is 0, where exp(−∞ + ∞) would be NaN.
    lse = lse.masked_fill(lse == -math.inf, math.inf)
    new: Any = torch.empty if call.options.key_padding_mask is None else torch.zeros
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    backend: Any = call.backend
    for at, blocks, options in _sequences(call, q, cu_seqlens):
        dq[at], dk[at], dv[at] = backend.block_sparse_backward(
            dout[at], q[at], k[at], v[at], lse[at], delta[at], blocks, options
        )
    return dq, dk, dv


def _sequences(
    call: Call, q: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> Iterator[tuple[tuple[slice, slice], BlockLists, AttentionOptions]]:
    """Each sequence: its index in `(B, S, …)` tensors, its blocks and the options of its call."""
    call, is_causal = call.numbered(q), call.options.is_causal
    for part, at in call.sequences(q, cu_seqlens):
        options = call.options._replace(key_padding_mask=part.key_padding_mask)
        if (rows := options.dropout_rows) is not None:
            options = options._replace(dropout_rows=DropoutRows(rows.queries[at], rows.keys[at]))
        yield at, block_lists(part.pattern, call.block_size, is_causal, q.device), options


@lru_cache(maxsize=64)
def block_lists(
    pattern: BlockPattern, block_size: int, is_causal: bool, device: torch.device
) -> BlockLists:
    """The lists of a pattern by rows and by columns, on `device`.

    Raises:
        ValueError: If the call is causal and a row keeps only blocks above the diagonal.
    """
    pattern = pattern.causal() if is_causal else pattern
    offsets, key_blocks = pattern.row_offsets, pattern.block_indices
    P, N = pattern.num_heads, pattern.num_blocks
    # Entries sorted by list and column; a stable sort keeps the rows of a column ascending.
    lists = torch.arange(P).repeat_interleave(offsets.diff().sum(1))
    columns = lists * N + key_blocks
    rows = torch.arange(N).repeat(P).repeat_interleave(offsets.diff().flatten())
    ends = torch.bincount(columns, minlength=P * N).cumsum(0).view(P, N)
    column_offsets = torch.cat([offsets[:, :1], ends], 1)
    query_blocks = rows[torch.argsort(columns, stable=True)]
    return BlockLists(
        *(block_size, offsets.to(device), key_blocks.to(device, torch.int32)),
        *(column_offsets.to(device), query_blocks.to(device, torch.int32)),
    )
