"""A whole call of dilated attention, forward and backward: documents, pieces, problems.

A backend that runs the whole pattern in its own launches gets the tensors unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch

from dilated_core.backends.contract import (
    AttentionBackend,
    AttentionInputs,
    AttentionOptions,
    Gradients,
    WholePatternBackend,
    check_gradients,
    check_output,
    has_capability,
)
from dilated_core.dropout import DropoutRows, dropout_rows
from dilated_core.inputs import read_document_bounds
from dilated_core.merge import AttentionOutput, accumulation_dtype
from dilated_core.pattern.branches import DilatedPattern, clip_pattern
from dilated_core.strips.attend import attend, differentiate, without_masked_rows
from dilated_core.strips.documents import WHOLE, Sequences, group_documents
from dilated_core.strips.plan import Span
from dilated_core.strips.view import is_batch_dense, is_viewable, viewable
from dilated_core.strips.workspace import Geometry, Piece, plan_pieces, smallest_workspace


class Call(NamedTuple):
    """Everything that determines a call, apart from its tensors.

    Attributes:
        backend: The backend chosen for `inputs`; forward and backward run the same one.
        pattern: The branches.
        inputs: The properties by which the backend was chosen.
        options: `key_padding_mask` is `(B, S)`.
        head_range: (first, total) as for `plan_problems`.
        span: The positions that the tensors hold, of a sequence of `inputs.seq_len`. Every branch
            begins a segment at `span.start` and ends one at `span.stop`. None: all positions.
        dropout_start: By which dropout counts the first position: not 0 where the tensors are part
            of a longer sequence.
    """

    backend: AttentionBackend
    pattern: DilatedPattern
    inputs: AttentionInputs
    options: AttentionOptions
    head_range: tuple[int, int]
    span: Span | None = None
    dropout_start: int = 0

    def masked(self, key_padding_mask: torch.Tensor | None) -> Call:
        """The call with this mask instead of its own."""
        return self._replace(options=self.options._replace(key_padding_mask=key_padding_mask))

    def maskless(self) -> Call:
        """The call without its mask."""
        return self.masked(None)


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
        ValueError: If the workspace is too small, or `cu_seqlens` does not fit.
    """
    if torch.is_autocast_enabled(q.device.type):
        # The public functions have cast the tensors; nothing inside may cast again.
        with torch.autocast(q.device.type, enabled=False):
            return forward(call, q, k, v, cu_seqlens)
    bounds = None if cu_seqlens is None else read_document_bounds(cu_seqlens, q.shape[1])
    if (whole := _whole_pattern(call, q)) is None:
        _check_workspace(call, q, k, v, bounds)
        return _forward_over_strips(call, q, k, v, bounds)
    k, v = without_masked_rows(k, call.options), without_masked_rows(v, call.options)
    pattern = clip_pattern(call.pattern, q.shape[1], q.shape[2])
    out, lse = whole.dilated_forward(q, k, v, pattern, call.options, cu_seqlens=cu_seqlens)
    check_output(whole, out, lse, q)
    return AttentionOutput(out.contiguous(), lse.contiguous())


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
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return backward(call, dout, dlse, q, k, v, out, lse, cu_seqlens)
    bounds = None if cu_seqlens is None else read_document_bounds(cu_seqlens, q.shape[1])
    dlse = None if dlse is None else dlse.contiguous()
    if (whole := _whole_pattern(call, q)) is None:
        return _backward_over_strips(call, dout, dlse, q, k, v, out, lse, bounds)
    options = call.options
    k, v = without_masked_rows(k, options), without_masked_rows(v, options)
    pattern = clip_pattern(call.pattern, q.shape[1], q.shape[2])
    grads = whole.dilated_backward(
        dout, dlse, q, k, v, out, lse, pattern, options, cu_seqlens=cu_seqlens
    )
    check_gradients(whole, grads, (q, k, v))
    dq, dk, dv = (grad.contiguous() for grad in grads)
    if (mask := options.key_padding_mask) is not None:
        dk, dv = (x.masked_fill(mask[:, :, None, None], 0) for x in (dk, dv))
    return dq, dk, dv


def _whole_pattern(call: Call, q: torch.Tensor) -> WholePatternBackend | None:
    """The backend, if it can run the pattern without strips; else None.

    Such a backend counts heads from 0 and treats a span as a whole sequence. Zero keys would then
    be too few: they fill the last segment up to w, and w would be clipped to the span.
    """
    if call.head_range != (0, q.shape[2]) or not has_capability(call.backend, WholePatternBackend):
        return None
    has_zero_keys = call.pattern.padding == "attended" and not call.options.is_causal
    if call.span is not None and has_zero_keys:
        longest = min(max(call.pattern.segment_lengths), call.inputs.seq_len or 0)
        if call.span.length < longest:
            return None
    return call.backend  # pyright: ignore[reportReturnType]


def _forward_over_strips(
    call: Call,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor | None,
) -> AttentionOutput:
    call, q, k, v = _prepared(call, q, k, v)
    if bounds is None:
        pieces = _plan(call, q, k, v)
        if len(pieces) == 1:
            problems = pieces[0].problems
            out, lse = attend(problems, q, k, v, call.options, backend=call.backend)
            out = out if out.dtype == q.dtype else out.to(q.dtype)
            return AttentionOutput(out.contiguous(), lse.contiguous())
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))
    index = 0
    for part, sequences in _sequences(call, q, bounds):
        q_, k_, v_ = (sequences.take(x) for x in (q, k, v))
        out_, lse_ = sequences.room(out), sequences.room(lse)
        for piece in _plan(part, q_, k_, v_):
            partial = attend(
                piece.problems,
                *(piece.rows(q_), piece.kv_rows(k_), piece.kv_rows(v_)),
                _options_of(call, sequences, piece, index),
                backend=call.backend,
            )
            piece.rows(out_).copy_(partial.out)
            piece.rows(lse_).copy_(partial.lse)
            del partial  # before the next one is made
            index += len(piece.problems)
        sequences.put(out, out_)
        sequences.put(lse, lse_)
    return AttentionOutput(out, lse)


def _backward_over_strips(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bounds: torch.Tensor | None,
) -> Gradients:
    """Gradients of q, k and v.

    The plan depends only on the strides of q, k and v, so it is the plan of forward. With another
    plan, problems would get other dropout seeds than in forward, by which some backends drop.
    """
    call, q, k, v = _prepared(call, q, k, v)
    dout, out, lse = dout.contiguous(), out.contiguous(), lse.contiguous()
    backend = call.backend
    if bounds is None:
        pieces = _plan(call, q, k, v)
        if len(pieces) == 1:
            tensors = (dout, q, k, v, out, lse)
            grads = differentiate(
                pieces[0].problems, *tensors, call.options, backend=backend, dlse=dlse
            )
            if grads[0].dtype == q.dtype:
                return grads
            dq, dk, dv = (grad.to(q.dtype) for grad in grads)
            return dq, dk, dv
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    index = 0
    for part, sequences in _sequences(call, q, bounds):
        q_, k_, v_, dout_, out_, lse_ = (sequences.take(x) for x in (q, k, v, dout, out, lse))
        dlse_ = None if dlse is None else sequences.take(dlse)
        dq_, dk_, dv_ = (sequences.room(x) for x in (dq, dk, dv))
        for piece in _plan(part, q_, k_, v_):
            grads = differentiate(
                piece.problems,
                *(piece.rows(dout_), piece.rows(q_), piece.kv_rows(k_), piece.kv_rows(v_)),
                *(piece.rows(out_), piece.rows(lse_)),
                _options_of(call, sequences, piece, index),
                backend=backend,
                dlse=None if dlse_ is None else piece.rows(dlse_),
            )
            piece.rows(dq_).copy_(grads[0])
            piece.kv_rows(dk_).copy_(grads[1])
            piece.kv_rows(dv_).copy_(grads[2])
            del grads
            index += len(piece.problems)
        for x, rows in ((dq, dq_), (dk, dk_), (dv, dv_)):
            sequences.put(x, rows)
    return dq, dk, dv


def _check_workspace(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor | None
) -> None:
    """Refuse a `max_workspace_bytes` that is too small.

    Raises:
        ValueError: If it is; the message has the smallest limit that would do.
    """
    limit = call.inputs.max_workspace_bytes
    if limit is None:
        return
    needed = _prepared_bytes(call, q, k, v) + _smallest(call, bounds)
    if limit < needed:
        raise ValueError(f"max_workspace_bytes is {limit}; these inputs need at least {needed}.")


def _prepared(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[Call, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Viewable tensors, and the call with the numbers by which it drops.

    Its workspace limit is less by the bytes of both.
    """
    inputs = call.inputs
    if inputs.max_workspace_bytes is not None:
        left = inputs.max_workspace_bytes - _prepared_bytes(call, q, k, v)
        call = call._replace(inputs=inputs._replace(max_workspace_bytes=left))
    if call.options.dropout_p:
        seed, first_head = call.options.dropout_seed, call.head_range[0]
        rows = dropout_rows(seed, q, first=call.dropout_start, first_head=first_head)
        call = call._replace(options=call.options._replace(dropout_rows=rows))
    return call, viewable(q), viewable(k), viewable(v)


def _prepared_bytes(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> int:
    copies = sum(x.numel() * x.element_size() for x in (q, k, v) if not is_viewable(x))
    # Numbers of queries and keys: three of int64 while they are computed, then one of int32.
    numbers = 28 * q.shape[0] * q.shape[1] if call.options.dropout_p else 0
    return copies + numbers


def _options_of(call: Call, sequences: Sequences, piece: Piece, index: int) -> AttentionOptions:
    """The options of a piece whose first problem has the number `index` of the call."""
    options = call.options
    mask, rows = options.key_padding_mask, options.dropout_rows
    if mask is not None and not piece.is_whole:
        mask = mask[piece.batches, piece.positions]
    if rows is not None:
        queries, keys = (
            sequences.take(x)[piece.batches, piece.positions] for x in (rows.queries, rows.keys)
        )
        assert rows.heads is not None
        rows = DropoutRows(queries, keys, rows.heads[piece.heads])
    return options._replace(
        dropout_seed=options.dropout_seed + index, key_padding_mask=mask, dropout_rows=rows
    )


def _plan(call: Call, *tensors: torch.Tensor) -> tuple[Piece, ...]:
    return plan_pieces(_geometry(call, tensors[0].shape[0], is_batch_dense(*tensors)))


def _geometry(call: Call, batch_size: int, is_dense: bool) -> Geometry:
    has_limit = call.inputs.max_workspace_bytes is not None
    return Geometry(
        call.pattern,
        call.inputs,
        batch_size,
        call.span or Span(0, call.inputs.seq_len or 0),
        call.head_range,
        call.options.is_causal,
        is_dense,
        call.backend if has_limit else None,
        torch.get_num_threads() if has_limit else 0,
    )


def _smallest(call: Call, bounds: torch.Tensor | None) -> int:
    """Bytes that the call needs at least, without copies of documents."""
    lengths = [call.inputs.seq_len]
    if bounds is not None:
        lengths = cast("list[int | None]", torch.unique(bounds.diff()).tolist())  # pyright: ignore
    calls = [call._replace(inputs=call.inputs._replace(seq_len=length)) for length in lengths]
    return max(smallest_workspace(_geometry(part, 1, False)) for part in calls)


def _sequences(
    call: Call, q: torch.Tensor, bounds: torch.Tensor | None
) -> Iterator[tuple[Call, Sequences]]:
    """The whole call, or if packed the documents of each length with the call for them."""
    if bounds is None:
        yield call, WHOLE
        return
    limit, max_copied = call.inputs.max_workspace_bytes, None
    H, H_kv = q.shape[2], call.inputs.num_kv_heads or q.shape[2]
    # A copied position: of q, k, v and out, of lse, and its index.
    row = 2 * (H + H_kv) * q.shape[3] * q.element_size() + 8 * H + 8
    if limit is not None:
        max_copied = (limit - _smallest(call, bounds)) // row
    for documents in group_documents(bounds, max_copied=max_copied):
        inputs = call.inputs._replace(seq_len=documents.length)
        if limit is not None and documents.index is not None:
            left = limit - documents.index.numel() * row
            inputs = inputs._replace(max_workspace_bytes=left)
        yield call._replace(inputs=inputs), documents
