"""The operators: dilated attention forward and backward as PyTorch sees them.

Two custom operators with schema, fake implementation and autograd formula, so that
`torch.compile(fullgraph=True)`, activation checkpointing, DDP and FSDP treat them like any
operator of PyTorch. Inputs are checked before they get here (inputs.py), except for what only the
values of `cu_seqlens` can tell: a compiler does not look inside an operator, so that is done here.
"""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import choose_backend
from dilated_core.inputs import document_bounds
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.strips.attend import Call, backward_over_strips, forward_over_strips, wide

# The dispatcher's state has no public name.
_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]

# Every argument of an operator costs microseconds at each call, so the options that are no tensors
# and that no compiler makes symbolic are one text; see `encode_options`.
_OPTIONS = (
    "float scale, float dropout_p, str options, Tensor? dropout_seed, Tensor? key_padding_mask, "
    "Tensor? cu_seqlens"
)


def encode_options(
    pattern: DilatedPattern,
    *,
    is_causal: bool,
    backend: str,
    max_workspace_bytes: int | None,
) -> str:
    """The argument `options` of both operators."""
    return repr(
        (
            *(pattern.segment_lengths, pattern.dilation_rates),
            *(pattern.head_offsets, pattern.padding),
            *(is_causal, backend, max_workspace_bytes),
        )
    )


class _Options(NamedTuple):
    pattern: DilatedPattern
    is_causal: bool
    backend: str
    max_workspace_bytes: int | None


@lru_cache(maxsize=1024)
def _decode_options(text: str) -> _Options:
    lengths, rates, head_offsets, padding, *others = literal_eval(text)
    pattern = DilatedPattern(lengths, rates, head_offsets=head_offsets, padding=padding)
    return _Options(pattern, *others)


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`.

    Args:
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with H_kv heads.
        *options: As `_OPTIONS` lists them.
    """
    if torch.is_autocast_enabled(q.device.type):
        # Dtypes are settled by now; a matrix product inside must not change them.
        with torch.autocast(q.device.type, enabled=False):
            return _forward(q, k, v, *options)
    call, cu_seqlens = _call(q, k, *options)
    if (whole := getattr(call.kernel, "dilated_forward", None)) is not None:
        out, lse = whole(q, k, v, call.pattern, **call.options(0), cu_seqlens=cu_seqlens)
        return out.contiguous(), lse.contiguous()
    return forward_over_strips(call, q, k, v, _bounds(cu_seqlens, q))


attention_forward = torch.library.custom_op(
    "dilated_core::attention_forward",
    _forward,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)


@attention_forward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=wide(q.dtype))


def _gradients(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Contiguous gradients of q, k, v from those of out and, unless None, of lse."""
    if torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):
            return _gradients(dout, dlse, q, k, v, out, lse, *options)
    call, cu_seqlens = _call(q, k, *options)
    if (whole := getattr(call.kernel, "dilated_backward", None)) is not None:
        tensors = (dout, dlse, q, k, v, out, lse)
        grads = whole(*tensors, call.pattern, **call.options(0), cu_seqlens=cu_seqlens)
        dq, dk, dv = (grad.contiguous() for grad in grads)
        return dq, dk, dv
    return backward_over_strips(call, dout, dlse, q, k, v, out, lse, _bounds(cu_seqlens, q))


attention_backward = torch.library.custom_op(
    "dilated_core::attention_backward",
    _gradients,
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)"
    ),
)


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
    q, k, v, ctx.scale, ctx.dropout_p, ctx.options, *tensor_options = inputs
    ctx.save_for_backward(q, k, v, *output, *tensor_options)
    # An lse that nobody differentiates then has gradient None, and costs nothing.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensor_options = ctx.saved_tensors
    nothing = (None,) * 6
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    if dout is None:
        dout = torch.zeros_like(out)
    options = (ctx.scale, ctx.dropout_p, ctx.options, *tensor_options)
    # Where the gradient itself is to be differentiated, the operator refuses that.
    is_plain = not torch.is_grad_enabled() and _is_plain(dout, q, k, v)
    gradients = _gradients if is_plain else attention_backward
    return (*gradients(dout, dlse, q, k, v, out, lse, *options), *nothing)


attention_forward.register_autograd(_backward, setup_context=_setup_context)


class _PlainAttention(torch.autograd.Function):
    """The operator without its way through the dispatcher, which is half of what a call costs."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        return _backward(ctx, *grads)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_forward`, differentiable, and by a shorter way where nobody looks.

    A compiler, a transform of torch.func, a dispatch mode (which selective checkpointing, FLOP
    counters and fake tensors are) and tensors of another class see the operator.
    """
    if not _is_plain(q, k, v):
        return attention_forward(q, k, v, *options)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _PlainAttention.apply(q, k, v, *options)
    return _forward(q, k, v, *options)


def _is_plain(*tensors: torch.Tensor) -> bool:
    """Whether operators on these tensors go straight to their kernels."""
    return (
        not torch.compiler.is_compiling()
        and all(type(x) is torch.Tensor for x in tensors)
        and _C._len_torch_dispatch_stack() == 0
        and _C._functorch.maybe_current_level() is None
        and all(x.device.type != "meta" for x in tensors)
    )


def _refuse_vmap(*args: Any) -> Any:
    raise ValueError(
        "torch.func.vmap over dilated attention is not supported; make the mapped dimension part "
        "of the batch instead, e.g. with q.flatten(0, 1) and out.unflatten(0, ...)."
    )


torch.library.register_vmap("dilated_core::attention_forward", _refuse_vmap)
torch.library.register_vmap("dilated_core::attention_backward", _refuse_vmap)


def _call(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[Call, torch.Tensor | None]:
    """The options with the backend chosen: here, where a compiler does not look inside.

    Backward comes to the same choice as forward, because it sees the same inputs.
    """
    pattern, is_causal, backend, max_workspace_bytes = _decode_options(options)
    inputs = AttentionInputs(
        q.device,
        q.dtype,
        num_heads=q.shape[2],
        head_dim=q.shape[3],
        dropout_p=dropout_p,
        num_kv_heads=k.shape[2],
        has_key_padding_mask=key_padding_mask is not None,
        is_packed=cu_seqlens is not None,
        max_workspace_bytes=max_workspace_bytes,
        seq_len=q.shape[1],
    )
    seed = 0 if dropout_seed is None else int(dropout_seed.item())
    kernel = choose_backend(backend, inputs)
    return Call(
        kernel, pattern, is_causal, scale, dropout_p, seed, key_padding_mask, max_workspace_bytes
    ), cu_seqlens


def _bounds(cu_seqlens: torch.Tensor | None, q: torch.Tensor) -> list[int] | None:
    return None if cu_seqlens is None else document_bounds(cu_seqlens, q.shape[1])
