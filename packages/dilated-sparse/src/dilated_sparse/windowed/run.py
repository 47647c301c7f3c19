"""Run the two plans of a window and its branches, forward and backward.

Forward merges both results into one out and lse. Backward runs both plans with the merged pair, as
core does with the branches of a pattern, so that each probability is that of the one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from dilated_core import (
    AttentionBackend,
    AttentionOptions,
    AttentionOutput,
    DilatedPattern,
    Gradients,
    Problem,
    fold_,
)
from dilated_core.dropout import DropoutRows, dropout_rows
from dilated_core.inputs import read_document_bounds
from dilated_core.merge import accumulation_dtype
from dilated_core.strips.attend import attend, differentiate
from dilated_core.strips.documents import WHOLE, Sequences, group_documents
from dilated_core.strips.view import is_batch_dense, viewable

from dilated_sparse.windowed.plan import Geometry, Overlap, Plan, plan_windowed, reverse


class Call(NamedTuple):
    """Everything that determines a call, apart from its tensors.

    Attributes:
        backend: Runs forward and backward.
        pattern: The branches, or None.
        window, overlap: See `windowed_dilated_attention`.
        head_range: (first, total) as for `dilated_core.plan_problems`.
        options: `key_padding_mask` is `(B, S)`.
    """

    backend: AttentionBackend
    pattern: DilatedPattern | None
    window: int
    overlap: Overlap
    head_range: tuple[int, int] | None
    options: AttentionOptions


def forward(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, not differentiable.

    Args:
        call: The options.
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with H_kv heads.
        cu_seqlens: Where each document of a packed sequence begins, and T; None if not packed.

    Raises:
        ValueError: If `cu_seqlens` does not fit.
    """
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    numbers = _dropout_rows(call, q)
    q, k, v = viewable(q), viewable(k), viewable(v)
    for sequences in _sequences(q, cu_seqlens):
        options = _options(call, sequences, numbers)
        q_, k_, v_ = (sequences.take(x) for x in (q, k, v))
        plan = _plan(call, q_, k_, v_)
        merged = attend(plan.forward, q_, k_, v_, options, backend=call.backend)
        if plan.turned:
            options = _turned(options)
            turned = attend(
                *(plan.turned, reverse(q_), reverse(k_), reverse(v_), options),
                backend=call.backend,
            )
            # The first problem may be everything: its result then has the dtype of q.
            merged = AttentionOutput(merged.out.to(merged.lse.dtype), merged.lse)
            fold_(merged, AttentionOutput(reverse(turned.out), reverse(turned.lse)))
            del turned
        for into, part in ((out, merged.out), (lse, merged.lse)):
            room = sequences.room(into)
            room.copy_(part)
            sequences.put(into, room)
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
    """Contiguous gradients of q, k, v from those of out and, unless None, of lse."""
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    numbers = _dropout_rows(call, q)
    q, k, v = viewable(q), viewable(k), viewable(v)
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    # Each problem shares it, where a backend takes it.
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
    for sequences in _sequences(q, cu_seqlens):
        rows = _Rows(*(sequences.take(x) for x in (dout, q, k, v, out, lse, delta)))
        dlse_ = None if dlse is None else sequences.take(dlse.contiguous())
        plan = _plan(call, rows.q, rows.k, rows.v)
        options = _options(call, sequences, numbers)
        parts = list(rows.differentiate(plan.forward, options, call.backend, dlse_))
        if plan.turned:
            dlse_ = None if dlse_ is None else reverse(dlse_)
            turned = _Rows(*map(reverse, rows))
            options = _turned(options)
            more = turned.differentiate(plan.turned, options, call.backend, dlse_)
            parts = [a + reverse(b) for a, b in zip(parts, more, strict=True)]
            del turned, more
        for into, part in zip(grads, parts, strict=True):
            room = sequences.room(into)
            room.copy_(part)
            sequences.put(into, room)
    return grads


class _Rows(NamedTuple):
    """What backward reads, of some sequences."""

    dout: torch.Tensor
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor

    def differentiate(
        self,
        problems: tuple[Problem, ...],
        options: AttentionOptions,
        backend: AttentionBackend,
        dlse: torch.Tensor | None,
    ) -> Gradients:
        """The gradients of some problems, in the dtype to accumulate in."""
        return differentiate(
            *(problems, self.dout, self.q, self.k, self.v, self.out, self.lse, options),
            backend=backend,
            delta=self.delta,
            dlse=dlse,
        )


def _plan(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Plan:
    B, S, H, _ = q.shape
    geometry = Geometry(
        call.window,
        call.overlap,
        call.options.is_causal,
        seq_len=S,
        batch_size=B,
        num_heads=H,
        num_kv_heads=k.shape[2],
        head_range=call.head_range,
        is_batch_dense=is_batch_dense(q, k, v),
    )
    return plan_windowed(call.pattern, geometry)


def _sequences(q: torch.Tensor, cu_seqlens: torch.Tensor | None) -> Iterator[Sequences]:
    if cu_seqlens is not None:
        yield from group_documents(read_document_bounds(cu_seqlens, q.shape[1]))
    elif q.numel():
        yield WHOLE


def _dropout_rows(call: Call, q: torch.Tensor) -> DropoutRows | None:
    """The numbers by which the positions and heads of the call are dropped."""
    if not call.options.dropout_p:
        return None
    first_head = 0 if call.head_range is None else call.head_range[0]
    return dropout_rows(call.options.dropout_seed, q, first_head=first_head)


def _options(call: Call, sequences: Sequences, numbers: DropoutRows | None) -> AttentionOptions:
    """The options for some sequences."""
    if numbers is not None:
        queries, keys = sequences.take(numbers.queries), sequences.take(numbers.keys)
        numbers = DropoutRows(queries, keys, numbers.heads)
    return call.options._replace(dropout_rows=numbers)


def _turned(options: AttentionOptions) -> AttentionOptions:
    """The options for reversed tensors."""
    mask, rows = options.key_padding_mask, options.dropout_rows
    if rows is not None:
        assert rows.heads is not None
        rows = DropoutRows(rows.queries.flip(1), rows.keys.flip(1), rows.heads.flip(0))
    return options._replace(
        key_padding_mask=None if mask is None else mask.flip(1),
        dropout_rows=rows,
    )
