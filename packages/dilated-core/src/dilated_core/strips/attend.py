"""Dilated attention by running an ordinary backend on each strip.

Forward runs the backend on each strip and merges (out, lse) as it goes; one pair is kept for all
branches. Backward runs the backend's backward on each strip with the *merged* out and lse, which
makes every strip's probabilities the global ones, and adds up.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch

from dilated_core.backends.contract import AttentionBackend
from dilated_core.merge import AttentionOutput, add_zero_keys, fold_lse_
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.strips.view import Strip
from dilated_core.strips.workspace import Piece, plan_pieces, smallest_workspace


class Call(NamedTuple):
    """The options of one call, as the strips need them."""

    kernel: AttentionBackend
    pattern: DilatedPattern
    is_causal: bool
    scale: float
    dropout_p: float
    dropout_seed: int
    key_padding_mask: torch.Tensor | None
    max_workspace_bytes: int | None

    def options(self, strip_index: int) -> dict[str, Any]:
        """Keywords for the backend; each strip drops by a seed of its own."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "dropout_seed": self.dropout_seed + strip_index,
            "key_padding_mask": self.key_padding_mask,
        }


def forward_over_strips(
    call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`.

    Args:
        call: The options.
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with H_kv heads.
        bounds: Where each document of a packed sequence begins, and T; None if not packed.
    """
    q, k, v = (_strided(x) for x in (q, k, v))
    if call.max_workspace_bytes is not None:
        _check_workspace(call, call.max_workspace_bytes, q, k, bounds)
    if bounds is None:
        pieces = _plan(call, q, k, v)
        if len(pieces) == 1:
            out, lse = _attend_piece(_masked(call, pieces[0]), pieces[0], 0, q, k, v)
            out = out if out.dtype == q.dtype else out.to(q.dtype)
            return out.contiguous(), lse.contiguous()
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:-1], dtype=wide(q.dtype))
    index = 0
    for q_, k_, v_, out_, lse_ in _sequences(bounds, q, k, v, out, lse):
        for piece in _plan(call, q_, k_, v_):
            inputs = piece.rows(q_), piece.kv_rows(k_), piece.kv_rows(v_)
            partial = _attend_piece(_masked(call, piece), piece, index, *inputs)
            piece.rows(out_).copy_(partial.out)
            piece.rows(lse_).copy_(partial.lse)
            del partial  # before the next one is made
            index += len(piece.strips)
    return out, lse


def backward_over_strips(
    call: Call,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bounds: list[int] | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous gradients of q, k and v; arguments as in `forward_over_strips`."""
    q, k, v = (_strided(x) for x in (q, k, v))
    # Like out it must not be what decides on the strips: they are those of forward, each with its
    # dropout seed.
    dout = dout.contiguous()
    if call.key_padding_mask is not None:
        # A row that sees no key at all: exp(score − ∞) is 0, where exp(−∞ + ∞) would be NaN.
        lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    if bounds is None:
        pieces = _plan(call, q, k, v)
        if len(pieces) == 1:
            tensors = (dout, dlse, q, k, v, out, lse)
            grads = _gradients_of_piece(_masked(call, pieces[0]), pieces[0], 0, *tensors)
            dq, dk, dv = (grad.to(q.dtype).contiguous() for grad in grads)
            return dq, dk, dv
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if dlse is None:
        dlse_of_sequences = None
    else:
        dlse_of_sequences = [part for (part,) in _sequences(bounds, dlse)]
    index = 0
    for i, (q_, k_, v_, dout_, out_, lse_, dq_, dk_, dv_) in enumerate(
        _sequences(bounds, q, k, v, dout, out, lse, dq, dk, dv)
    ):
        dlse_ = None if dlse_of_sequences is None else dlse_of_sequences[i]
        for piece in _plan(call, q_, k_, v_):
            grads = _gradients_of_piece(
                _masked(call, piece),
                piece,
                index,
                piece.rows(dout_),
                None if dlse_ is None else piece.rows(dlse_),
                piece.rows(q_),
                piece.kv_rows(k_),
                piece.kv_rows(v_),
                piece.rows(out_),
                piece.rows(lse_),
            )
            piece.rows(dq_).copy_(grads[0])
            piece.kv_rows(dk_).copy_(grads[1])
            piece.kv_rows(dv_).copy_(grads[2])
            del grads
            index += len(piece.strips)
    return dq, dk, dv


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate and to keep lse in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def _attend_piece(
    call: Call, piece: Piece, index: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> AttentionOutput:
    """Attention of one piece, whose first strip has the given index.

    Half precision is folded in float32, with one rounding at the end and not one per branch; the
    result is then float32, unless there is nothing to fold.
    """
    B, S, H, D = q.shape
    strips = piece.strips
    if len(strips) == 1 and strips[0].is_everything:
        return _attend_strip(call, index, strips[0], q, k, v)
    folded = 0
    if strips and strips[0].num_elements == B * S * H:
        # An undilated branch without a tail: its result is where all others fold into.
        out, lse = _attend_strip(call, index, strips[0], q, k, v)
        out, lse = out.reshape(B, S, H, D), lse.reshape(B, S, H)
        if len(strips) > 1:
            out, lse = out.to(wide(q.dtype)).contiguous(), lse.contiguous()
        folded = 1
    else:
        out = q.new_zeros(B, S, H, D, dtype=wide(q.dtype))
        lse = out.new_full((B, S, H), float("-inf"))
    for i, strip in enumerate(strips[folded:], folded):
        partial = _attend_strip(call, index + i, strip, q, k, v)
        lse_view, out_view = strip.view(lse), strip.view(out)
        if strip.is_first:
            lse_view.copy_(partial.lse)
            out_view.copy_(partial.out)
        else:
            weight = fold_lse_(lse_view, partial.lse).unsqueeze(-1)
            out_view.lerp_(partial.out.to(out.dtype), weight)
        del partial  # before the next one is made
    return AttentionOutput(out, lse)


def _attend_strip(
    call: Call, index: int, strip: Strip, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> AttentionOutput:
    """Attention within one strip, with the zero keys that its segments are padded with."""
    partial = call.kernel.forward(
        strip.view(q), strip.view_kv(k), strip.view_kv(v), **_options(call, index, strip, k)
    )
    # Causal queries lie before the padding of their segment, so they never see it.
    if strip.zero_keys and not call.is_causal:
        return add_zero_keys(partial, strip.zero_keys)
    return partial


def _gradients_of_piece(
    call: Call,
    piece: Piece,
    index: int,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[torch.Tensor]:
    """Gradients of q, k and v of one piece, summed in float32 or wider."""
    B, S, H, _ = q.shape
    totals: list[torch.Tensor] | None = None
    for i, strip in enumerate(piece.strips, index):
        q_rows, k_rows, v_rows = strip.view(q), strip.view_kv(k), strip.view_kv(v)
        rows = (strip.view(dout), q_rows, k_rows, v_rows, strip.view(out), strip.view(lse))
        dq, dk, dv = call.kernel.backward(*rows, **_options(call, i, strip, k))
        if totals is None:
            if strip.num_elements == B * S * H:
                totals = [
                    grad.to(wide(q.dtype)).reshape(x.shape).contiguous()
                    for grad, x in ((dq, q), (dk, k), (dv, v))
                ]
                continue
            totals = [x.new_zeros(x.shape, dtype=wide(q.dtype)) for x in (q, k, v)]
        strip.view(totals[0]).add_(dq)
        strip.view_kv(totals[1]).add_(dk)
        strip.view_kv(totals[2]).add_(dv)
        del dq, dk, dv  # before the next ones are made
    if totals is None:
        totals = [torch.zeros_like(x) for x in (q, k, v)]
    if dlse is not None:
        _add_gradient_through_lse_(call, piece, totals[0], totals[1], dlse, q, k, lse)
    return totals


def _add_gradient_through_lse_(
    call: Call,
    piece: Piece,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Add what a gradient of lse sends to q and k: ds += p · dlse.

    Its two products are what attention computes anyway, so any backend can give them:
    p·k is a forward with k in the place of v, and (p · dlse)ᵀ·q is the dv of a backward whose dout
    is dlse · q. Dropout comes after the softmax, so the lse does not depend on it.
    """
    call = call._replace(dropout_p=0.0)
    dlse = (dlse * call.scale).unsqueeze(-1)
    dout = (dlse * q).to(q.dtype)
    zeros_q, zeros_k = torch.zeros_like(q), torch.zeros_like(k)
    for strip in piece.strips:
        options = _options(call, 0, strip, k)
        q_rows, k_rows, lse_rows = strip.view(q), strip.view_kv(k), strip.view(lse)
        partial = call.kernel.forward(q_rows, k_rows, k_rows, **options)
        weight = (partial.lse - lse_rows).exp_().unsqueeze(-1)
        strip.view(dq).add_(strip.view(dlse) * weight * partial.out)
        dk_rows = call.kernel.backward(
            strip.view(dout), q_rows, k_rows, strip.view_kv(zeros_k), strip.view(zeros_q), lse_rows,
            **options,
        )[2]  # fmt: skip
        strip.view_kv(dk).add_(dk_rows)


def _plan(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[Piece, ...]:
    B, S, H, D = q.shape
    dense = all(x.stride(0) == S * x.stride(1) for x in (q, k, v))
    return plan_pieces(
        call.pattern,
        (B, S, H, D),
        k.shape[2],
        q.dtype,
        is_batch_dense=dense,
        max_workspace_bytes=call.max_workspace_bytes,
    )


def _check_workspace(
    call: Call, limit: int, q: torch.Tensor, k: torch.Tensor, bounds: list[int] | None
) -> None:
    needed = max(
        smallest_workspace(call.pattern, tuple(q_.shape), k_.shape[2], q_.dtype)
        for q_, k_ in _sequences(bounds, q, k)
    )
    if limit < needed:
        raise ValueError(f"max_workspace_bytes is {limit}; these inputs need at least {needed}.")


def _masked(call: Call, piece: Piece) -> Call:
    """The call with the piece's part of the mask, which is `(B, S)`."""
    if call.key_padding_mask is None or piece.is_whole:
        return call
    return call._replace(key_padding_mask=call.key_padding_mask[piece.batches, piece.positions])


def _options(call: Call, index: int, strip: Strip, k: torch.Tensor) -> dict[str, Any]:
    options = call.options(index)
    if call.key_padding_mask is not None:
        mask = call.key_padding_mask.unsqueeze(-1).expand(k.shape[:3])
        options["key_padding_mask"] = strip.view_kv(mask)
    return options


def _sequences(
    bounds: list[int] | None, *tensors: torch.Tensor
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The tensors themselves; if packed, views of each run of documents of one length as a batch.

    Args:
        bounds: Where each document begins, and T; None if not packed.
        *tensors: `(B, S, …)`; `(1, T, …)` if packed.
    """
    if bounds is None:
        yield tensors
        return
    start = 0
    for length, run in groupby(stop - begin for begin, stop in pairwise(bounds)):
        stop = start + length * len(list(run))
        yield tuple(x[0, start:stop].view(-1, length, *x.shape[2:]) for x in tensors)
        start = stop


def _strided(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where kernels can read it through its strides, else a contiguous copy.

    Kernels want unit stride along head_dim; expanded (stride 0) dimensions are copied, too.
    """
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()
