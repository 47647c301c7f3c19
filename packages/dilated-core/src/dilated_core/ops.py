"""The operators: dilated attention forward and backward as PyTorch sees them.

Two custom operators with schema, fake implementation and autograd formula, so that
`torch.compile(fullgraph=True)`, activation checkpointing, DDP and FSDP treat them like any
operator of PyTorch. Inputs are checked before they get here (inputs.py).

Forward runs the backend on each strip and merges (out, lse) as it goes; one pair is kept for all
branches. Backward runs the backend's backward on each strip with the *merged* out and lse, which
makes every strip's probabilities the global ones, and adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from dilated_core.backend import AttentionBackend, AttentionInputs
from dilated_core.merge import add_zero_keys, fold_lse_
from dilated_core.output import AttentionOutput
from dilated_core.pattern import DilatedPattern, HeadOffsets, Padding
from dilated_core.registry import choose_backend
from dilated_core.strips import Strip, plan_strips

_HALF_DTYPES = (torch.bfloat16, torch.float16)

# The pattern and the options, as an operator's schema can carry them.
_OPTIONS = (
    "int[] segment_lengths, int[] dilation_rates, str head_offsets, str padding, "
    "bool is_causal, float scale, str backend, float dropout_p, Tensor? dropout_seed"
)


class _Call(NamedTuple):
    """The options of one call, as the strips need them."""

    kernel: AttentionBackend
    pattern: DilatedPattern
    is_causal: bool
    scale: float
    dropout_p: float
    dropout_seed: int

    def options(self, strip_index: int) -> dict[str, Any]:
        """Keywords for the backend; each strip drops by a seed of its own."""
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "dropout_p": self.dropout_p,
            "dropout_seed": self.dropout_seed + strip_index,
        }


@torch.library.custom_op(
    "dilated_core::attention_forward",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)
def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: HeadOffsets,
    padding: Padding,
    is_causal: bool,
    scale: float,
    backend: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, S, H, D)` q, k, v -> contiguous out `(B, S, H, D)` and lse `(B, S, H)`."""
    pattern = DilatedPattern(
        tuple(segment_lengths), tuple(dilation_rates), head_offsets=head_offsets, padding=padding
    )
    call = _call(q, pattern, is_causal, scale, backend, dropout_p, dropout_seed)
    if (whole := getattr(call.kernel, "dilated_forward", None)) is not None:
        out, lse = whole(q, k, v, pattern, **call.options(0))
        return out.contiguous(), lse.contiguous()

    q, k, v = (_strided(x) for x in (q, k, v))
    B, S, H, D = q.shape
    strips = _plan(pattern, q, k, v)
    folded = 0
    if strips and strips[0].num_elements == B * S * H:
        # An undilated branch without a tail: its result is where all others fold into.
        out, lse = _attend(call, 0, strips[0], q, k, v)
        out, lse = out.reshape(B, S, H, D).contiguous(), lse.reshape(B, S, H).contiguous()
        folded = 1
    else:
        out = q.new_zeros(B, S, H, D)
        lse = out.new_full((B, S, H), float("-inf"), dtype=_wide(q.dtype))

    postponed: list[tuple[Strip, torch.Tensor, torch.Tensor]] = []
    for i, strip in enumerate(strips[folded:], folded):
        partial = _attend(call, i, strip, q, k, v)
        lse_view, out_view = strip.view(lse), strip.view(out)
        if strip.is_first:
            lse_view.copy_(partial.lse)
            out_view.copy_(partial.out)
            continue
        weight = fold_lse_(lse_view, partial.lse).unsqueeze(-1)
        if q.dtype in _HALF_DTYPES:
            postponed.append((strip, partial.out, weight))
        else:
            out_view.lerp_(partial.out, weight)
    if postponed:
        _fold_in_float32_(out, postponed)
    return out, lse


@attention_forward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=_wide(q.dtype))


@torch.library.custom_op(
    "dilated_core::attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)"
    ),
)
def attention_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: HeadOffsets,
    padding: Padding,
    is_causal: bool,
    scale: float,
    backend: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v `(B, S, H, D)` from those of out and lse."""
    pattern = DilatedPattern(
        tuple(segment_lengths), tuple(dilation_rates), head_offsets=head_offsets, padding=padding
    )
    call = _call(q, pattern, is_causal, scale, backend, dropout_p, dropout_seed)
    if (whole := getattr(call.kernel, "dilated_backward", None)) is not None:
        grads = whole(dout, dlse, q, k, v, out, lse, pattern, **call.options(0))
        dq, dk, dv = (grad.contiguous() for grad in grads)
        return dq, dk, dv

    q, k, v = (_strided(x) for x in (q, k, v))
    # Like out it must not be what decides on the strips: they are those of forward, each with its
    # dropout seed.
    dout = dout.contiguous()
    B, S, H, D = q.shape
    strips = _plan(pattern, q, k, v)
    totals: list[torch.Tensor] | None = None
    for i, strip in enumerate(strips):
        rows = [strip.view(x) for x in (dout, q, k, v, out, lse)]
        grads = call.kernel.backward(*rows, **call.options(i))
        if totals is None:
            if strip.num_elements == B * S * H:
                totals = [g.to(_wide(q.dtype)).reshape(B, S, H, D).contiguous() for g in grads]
                continue
            totals = [q.new_zeros(B, S, H, D, dtype=_wide(q.dtype)) for _ in grads]
        for total, grad in zip(totals, grads, strict=True):
            strip.view(total).add_(grad)
    if totals is None:
        totals = [q.new_zeros(B, S, H, D) for _ in range(3)]
    if dlse is not None:
        _add_gradient_through_lse_(call, totals[0], totals[1], dlse, q, k, lse, strips)
    dq, dk, dv = (total.to(q.dtype) for total in totals)
    return dq, dk, dv


@attention_backward.register_fake
def _(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, *ctx.options, dropout_seed = inputs
    ctx.save_for_backward(q, k, v, *output, dropout_seed)
    # An lse that nobody differentiates then has gradient None, and costs nothing.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, dropout_seed = ctx.saved_tensors
    options = (*ctx.options, dropout_seed)
    nothing = (None,) * len(options)
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    if dout is None:
        dout = torch.zeros_like(out)
    return (*attention_backward(dout, dlse, q, k, v, out, lse, *options), *nothing)


attention_forward.register_autograd(_backward, setup_context=_setup_context)


def _call(
    q: torch.Tensor,
    pattern: DilatedPattern,
    is_causal: bool,
    scale: float,
    backend: str,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> _Call:
    """The options with the backend chosen: here, where a compiler does not look inside.

    Backward comes to the same choice as forward, because it sees the same inputs.
    """
    _, _, H, D = q.shape
    kernel = choose_backend(backend, AttentionInputs(q.device, q.dtype, H, D, dropout_p))
    seed = 0 if dropout_seed is None else int(dropout_seed.item())
    return _Call(kernel, pattern, is_causal, scale, dropout_p, seed)


def _attend(
    call: _Call, index: int, strip: Strip, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> AttentionOutput:
    """Attention within one strip, with the zero keys that its segments are padded with."""
    partial = call.kernel.forward(
        strip.view(q), strip.view(k), strip.view(v), **call.options(index)
    )
    # Causal queries lie before the padding of their segment, so they never see it.
    if strip.zero_keys and not call.is_causal:
        return add_zero_keys(partial, strip.zero_keys)
    return partial


def _fold_in_float32_(
    out: torch.Tensor, partials: list[tuple[Strip, torch.Tensor, torch.Tensor]]
) -> None:
    """Fold half-precision partials into `out` with one rounding at the end, not one per branch.

    A quarter of head_dim at a time: the float32 workspace stays at half the size of `out`.
    """
    width = -(-out.shape[-1] // 4)
    for start in range(0, out.shape[-1], width):
        columns = slice(start, start + width)
        workspace = out[..., columns].float().contiguous()
        for strip, partial_out, weight in partials:
            strip.view(workspace).lerp_(partial_out[..., columns].float(), weight)
        out[..., columns] = workspace


def _add_gradient_through_lse_(
    call: _Call,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dlse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    strips: Sequence[Strip],
) -> None:
    """Add what a gradient of lse sends to q and k: ds += p · dlse.

    Its two products are what attention computes anyway, so any backend can give them:
    p·k is a forward with k in the place of v, and (p · dlse)ᵀ·q is the dv of a backward whose dout
    is dlse · q. Dropout comes after the softmax, so the lse does not depend on it.
    """
    call = call._replace(dropout_p=0.0)
    options = call.options(0)
    # Rows without any key have a constant lse.
    dlse = (dlse * call.scale).masked_fill(lse == float("-inf"), 0).unsqueeze(-1)
    dout = (dlse * q).to(q.dtype)
    zeros = torch.zeros_like(q)
    for strip in strips:
        q_rows, k_rows, lse_rows = strip.view(q), strip.view(k), strip.view(lse)
        partial = call.kernel.forward(q_rows, k_rows, k_rows, **options)
        weight = (partial.lse - lse_rows).exp_().unsqueeze(-1)
        strip.view(dq).add_(strip.view(dlse) * weight * partial.out)
        none = strip.view(zeros)
        dk_rows = call.kernel.backward(
            strip.view(dout), q_rows, k_rows, none, none, lse_rows, **options
        )[2]
        strip.view(dk).add_(dk_rows)


def _plan(pattern: DilatedPattern, *tensors: torch.Tensor) -> tuple[Strip, ...]:
    B, S, H, _ = tensors[0].shape
    dense = all(x.stride(0) == S * x.stride(1) for x in tensors)
    return plan_strips(pattern, B, S, H, is_batch_dense=dense)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where kernels can read it through its strides, else a contiguous copy.

    Kernels want unit stride along head_dim; expanded (stride 0) dimensions are copied, too.
    """
    return x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate and to keep lse in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)
