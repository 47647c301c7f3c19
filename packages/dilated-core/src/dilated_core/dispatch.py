"""How a call reaches its backend: directly, through an operator, or as a transform.

A plain eager call skips the dispatcher, which is half of what a small call costs.
"""

from __future__ import annotations

from operator import index
from typing import Any

import torch

from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import choose_backend, record_choice
from dilated_core.flops import register_formulas
from dilated_core.ops import (
    Settings,
    attention_backward,
    attention_forward,
    encode_call,
    encode_options,
    make_call,
)
from dilated_core.strips.call import Call, backward, forward
from dilated_core.transforms import TransformedAttention, differentiable_backward, is_batched

# The dispatcher's state has no public name.
_C: Any = torch._C  # pyright: ignore[reportPrivateUsage]


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    settings: Settings,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, differentiable.

    Skips the dispatcher, which is half of what a small call costs, unless a compiler, a dispatch
    mode (such as selective checkpointing, FLOP counters and fake tensors), a tensor subclass or the
    meta device must see the operator.

    Args:
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with H_kv heads.
        settings: Everything that is no tensor.
        dropout_seed: int64 on the CPU, a scalar, or `(2,)`: the seed and the number of the first
            position, where the tensors are part of a longer sequence; None without dropout.
        key_padding_mask: `(B, S)` bool or None.
        cu_seqlens: `(N + 1,)` if packed, or None.
    """
    if is_plain(q, k, v):
        call = make_call(q, k, settings, dropout_seed, key_padding_mask, cu_seqlens)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _PlainAttention.apply(q, k, v, call, cu_seqlens)
        return forward(call, q, k, v, cu_seqlens)
    if not torch.compiler.is_compiling() and is_transformed(q, k, v):
        call = make_call(q, k, settings, dropout_seed, key_padding_mask, cu_seqlens)
        return TransformedAttention.apply(q, k, v, key_padding_mask, cu_seqlens, call.maskless())
    if not torch.compiler.is_compiling():
        register_formulas()
    is_masked, is_packed = key_padding_mask is not None, cu_seqlens is not None
    backend = settings.backend
    choice = (
        _recorded_choice(
            *(backend, q.device.type, q.device.index, str(q.dtype).removeprefix("torch.")),
            # operator.index fixes a symbolic size to its number; int() would not.
            *(index(q.shape[2]), index(q.shape[3]), index(k.shape[2])),
            *(dropout_seed is not None, is_masked, is_packed, settings.max_workspace_bytes),
        )
        if isinstance(backend, str)
        else record_choice(backend)
    )
    options = encode_options(
        settings.pattern,
        is_causal=settings.is_causal,
        backend=choice,
        max_workspace_bytes=settings.max_workspace_bytes,
        head_range=settings.head_range,
    )
    tensors = (dropout_seed, key_padding_mask, cu_seqlens)
    return attention_forward(q, k, v, settings.scale, settings.dropout_p, options, *tensors)


def is_plain(*tensors: torch.Tensor) -> bool:
    """Whether no compiler, mode, tensor subclass or transform must see these tensors' operators."""
    if torch.compiler.is_compiling() or _C._len_torch_dispatch_stack() > 0:
        return False
    for x in tensors:
        if type(x) is not torch.Tensor or x.is_meta:
            return False
    return not is_transformed(*tensors)


def is_transformed(*tensors: torch.Tensor) -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    if torch.autograd.forward_ad._current_level >= 0:  # pyright: ignore
        duals: list[Any] = [torch.autograd.forward_ad.unpack_dual(x) for x in tensors]
        if any(dual.tangent is not None for dual in duals):
            return True
    level: int | None = _C._functorch.maybe_current_level()
    return level is not None


class _PlainAttention(torch.autograd.Function):
    """Attention as an autograd function, which skips the dispatcher."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        call: Call,
        cu_seqlens: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = forward(call, q, k, v, cu_seqlens)
        # The mask is saved as a tensor, so that hooks on saved tensors see it.
        ctx.call = call.maskless()
        ctx.save_for_backward(q, k, v, out, lse, call.options.key_padding_mask, cu_seqlens)
        # The gradient of an unused lse is then None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        dout, dlse = grads
        if dout is None and dlse is None:
            return (None,) * 5
        q, k, v, out, lse, mask, cu_seqlens = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        call = ctx.call.masked(mask)
        tensors = (dout, dlse, q, k, v, out, lse)
        if torch.is_grad_enabled():
            return (*differentiable_backward(call, *tensors, cu_seqlens), None, None)
        if is_plain(dout, q, k, v) and not is_batched(dout, dlse):
            return (*backward(call, *tensors, cu_seqlens), None, None)
        register_formulas()
        grads = attention_backward(*tensors, *encode_call(call), mask, cu_seqlens)
        return (*grads, None, None)


def _recorded_choice(
    name: str,
    device_type: str,
    device_index: int | None,
    dtype: str,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int,
    has_dropout: bool,
    has_key_padding_mask: bool,
    is_packed: bool,
    max_workspace_bytes: int | None,
) -> str | tuple[str, int]:
    """The chosen backend as `record_choice`, or the name itself where none can run.

    Where none can run, the operator raises the error. The inputs have no `seq_len`, because one
    graph may serve every length.
    """
    inputs = AttentionInputs(
        torch.device(device_type if device_index is None else f"{device_type}:{device_index}"),
        getattr(torch, dtype),
        num_heads,
        head_dim,
        dropout_p=0.5 if has_dropout else 0.0,
        num_kv_heads=num_kv_heads,
        has_key_padding_mask=has_key_padding_mask,
        is_packed=is_packed,
        max_workspace_bytes=max_workspace_bytes,
    )
    try:
        return record_choice(choose_backend(name, inputs))
    except ValueError:
        return name


# Makes the choice a constant of a compiled graph, so that backward runs the backend of forward.
# `torch.compiler.assume_constant_result` sets the same mark, but first imports the compiler and
# Triton, which takes seconds.
_recorded_choice._dynamo_marked_constant = True  # pyright: ignore
