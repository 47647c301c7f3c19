"""Transforms of `torch.func`, forward mode and second derivatives of dilated attention.

Plain first derivatives do not use this module. Here the operators are autograd functions with a
rule for each transform. Under vmap the mapped dimension becomes part of the batch. Derivatives of
the gradient are computed by strips/composite.py, in operations that PyTorch can differentiate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch

from dilated_core.backends.contract import Gradients
from dilated_core.ops import attention_backward, attention_forward, encode_call
from dilated_core.strips import composite
from dilated_core.strips.call import Call, backward, forward

_Masks = tuple[torch.Tensor | None, torch.Tensor | None]


class TransformedAttention(torch.autograd.Function):
    """out and lse of q, k, v, with key_padding_mask and cu_seqlens, by a call without its mask."""

    @staticmethod
    def forward(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        key_padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        call: Call,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The result, by the backend."""
        if _is_traced():
            return attention_forward(q, k, v, *encode_call(call), key_padding_mask, cu_seqlens)
        return forward(call.masked(key_padding_mask), q, k, v, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save what the derivatives need."""
        *tensors, ctx.call = inputs
        _refuse_dropout(ctx.call)
        ctx.save_for_backward(*tensors, *output)
        ctx.save_for_forward(*tensors, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        """Gradients of q, k and v."""
        q, k, v, mask, cu_seqlens, out, lse = ctx.saved_tensors
        dout, dlse = grads
        if dout is None and dlse is None:
            return (None,) * 6
        dout = torch.zeros_like(out) if dout is None else dout
        call = ctx.call.masked(mask)
        tensors = (dout, dlse, q, k, v, out, lse)
        return (*differentiable_backward(call, *tensors, cu_seqlens), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Tangents of out and lse."""
        _refuse_nested_forward_mode()
        q, k, v, mask, cu_seqlens, out, lse = ctx.saved_tensors
        dq, dk, dv = (
            torch.zeros_like(x) if tangent is None else tangent
            for tangent, x in zip(tangents[:3], (q, k, v), strict=True)
        )
        call = ctx.call.masked(mask)
        return composite.tangents(call, dq, dk, dv, q, k, v, out, lse, cu_seqlens)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """The mapped dimension as part of the batch."""
        *tensors, call = inputs
        return _mapped(TransformedAttention.apply, info.batch_size, in_dims[:-1], tensors, call)


class _TransformedGradients(torch.autograd.Function):
    """dq, dk, dv, themselves differentiable."""

    @staticmethod
    def forward(*inputs: Any) -> Gradients:
        """The gradients, by the backend."""
        *tensors, mask, cu_seqlens, call = inputs
        dout, dlse, q, k, v, out, lse = tensors
        if _is_traced() or is_batched(dout, dlse):
            return attention_backward(*tensors, *encode_call(call), mask, cu_seqlens)
        return backward(call.masked(mask), dout, dlse, q, k, v, out, lse, cu_seqlens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Save what the derivatives need."""
        *tensors, ctx.call = inputs
        _refuse_dropout(ctx.call)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        """Gradients of everything that the gradients depend on."""
        function, given = _composite_gradients(ctx)
        pair: Any = torch.func.vjp(function, *given.values())
        vjp = pair[1]
        results = dict(zip(given, vjp(grads), strict=True))
        return (*(results.get(i) for i in range(7)), None, None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: torch.Tensor | None) -> Gradients:
        """Tangents of the gradients."""
        _refuse_nested_forward_mode()
        function, given = _composite_gradients(ctx)
        directions = tuple(
            torch.zeros_like(x) if tangents[i] is None else tangents[i] for i, x in given.items()
        )
        # The gradient of a sum is one number for every element, which no dual tensor may be.
        primals = tuple(x.contiguous() for x in given.values())
        return torch.func.jvp(function, primals, directions)[1]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """The mapped dimension as part of the batch."""
        *tensors, call = inputs
        return _mapped(_TransformedGradients.apply, info.batch_size, in_dims[:-1], tensors, call)


def differentiable_backward(
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
    """dq, dk, dv by the backend, and their own derivatives in elementary operations."""
    mask = call.options.key_padding_mask
    tensors = (dout, dlse, q, k, v, out, lse, mask, cu_seqlens)
    # torch types `apply` by the signature of forward, as if its first argument were a context.
    return cast(Any, _TransformedGradients).apply(*tensors, call.maskless())


def _composite_gradients(
    ctx: Any,
) -> tuple[Callable[..., Gradients], dict[int, torch.Tensor]]:
    """The gradients as a function of those saved tensors that are given, by their number."""
    *tensors, mask, cu_seqlens = ctx.saved_tensors
    given = {i: x for i, x in enumerate(tensors) if x is not None}
    call = ctx.call.masked(mask)

    def function(*values: torch.Tensor) -> Gradients:
        found = dict(zip(given, values, strict=True))
        dout, q, k, v, out, lse = (found[i] for i in (0, 2, 3, 4, 5, 6))
        return composite.gradients(call, dout, found.get(1), q, k, v, out, lse, cu_seqlens)

    return function, given


def _mapped(
    function: Callable[..., Any],
    size: int,
    in_dims: tuple[int | None, ...],
    tensors: list[torch.Tensor | None],
    call: Call,
) -> tuple[Any, Any]:
    """Run `function` with the mapped dimension as part of the batch; results have it in front."""
    *_, cu_seqlens = tensors
    moved = [
        x if x is None or dim is None else x.movedim(dim, 0)
        for x, dim in zip(tensors, in_dims, strict=True)
    ]
    if cu_seqlens is not None:
        # A packed sequence has no batch to become part of. Of a mapped dimension of size 0, one
        # sequence of zeros gives the shapes.
        if size == 0:
            moved = [
                x if x is None or dim is None else x.new_zeros(1, *x.shape[1:])
                for x, dim in zip(moved, in_dims, strict=True)
            ]
        runs = [
            function(
                *(
                    x if x is None or dim is None else x[i]
                    for x, dim in zip(moved, in_dims, strict=True)
                ),
                call,
            )
            for i in range(max(1, size))
        ]
        results = tuple(torch.stack(parts)[:size] for parts in zip(*runs, strict=True))
        return results, (0,) * len(results)
    folded = [
        None if x is None else (x.expand(size, *x.shape) if dim is None else x).flatten(0, 1)
        for x, dim in zip(moved, in_dims, strict=True)
    ]
    # Both sizes are given: PyTorch cannot infer one in an empty tensor.
    batch = next(
        x.shape[0 if dim is None else 1]
        for x, dim in zip(moved, in_dims, strict=True)
        if x is not None
    )
    results = tuple(x.unflatten(0, (size, batch)) for x in function(*folded, call))
    return results, (0,) * len(results)


def is_batched(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd runs one backward for many gradients, as with `is_grads_batched=True`.

    PyTorch then passes tensors with a hidden dimension, which cannot be copied to where a backend
    writes. An operator runs once for each gradient.
    """
    functorch: Any = torch._C._functorch  # pyright: ignore
    return any(x is not None and functorch.is_legacy_batchedtensor(x) is True for x in tensors)


def _is_traced() -> bool:
    """Whether a dispatch mode records what runs: it must see an operator, not views written to."""
    return torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore


def _refuse_dropout(call: Call) -> None:
    if call.options.dropout_p:
        raise ValueError(
            f"dropout_p is {call.options.dropout_p}; forward mode, second derivatives and "
            f"torch.func know dilated attention without dropout only, so set it to 0 for them."
        )


def _refuse_nested_forward_mode() -> None:
    """Refuse the rule of one forward mode inside another: PyTorch does not differentiate it.

    The tangent of the tangent would silently lack the terms of the rule itself. The levels are the
    transform whose rule runs, and the transforms around it.
    """
    functorch: Any = torch._C._functorch  # pyright: ignore
    levels = cast("list[Any]", functorch.get_interpreter_stack() or [])
    kinds: list[Any] = [level.key() for level in levels]
    if kinds.count(functorch.TransformType.Jvp) > 1:
        raise ValueError(
            "forward mode is nested in forward mode, as in jacfwd(jacfwd(f)); PyTorch does not "
            "differentiate a forward rule in forward mode, so use torch.func.hessian(f) or another "
            "order with jacrev or grad inside."
        )
