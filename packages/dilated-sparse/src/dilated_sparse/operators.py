"""Define a pair of PyTorch operators, forward and backward, so that compilers see one node."""

from __future__ import annotations

from collections.abc import Callable
from operator import index
from typing import Any

import torch
from dilated_core import AttentionInputs, AttentionOutput, Gradients
from dilated_core.backends.registry import choose_backend, record_choice
from dilated_core.dispatch import is_plain
from dilated_core.merge import accumulation_dtype
from torch.autograd.function import once_differentiable


class AttentionOperator:
    """Attention as custom operators with schema, fake implementation and autograd formula.

    Args:
        name: Of the operators, as namespace::name; `_forward` and `_backward` are appended.
        schema: Of the arguments after q, k and v, as in a schema of PyTorch.
        forward: From q, k, v and these arguments to out and lse.
        backward: From dout, dlse (or None), q, k, v, out, lse and these arguments to dq, dk, dv.

    Attributes:
        forward, backward: The custom operators.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        forward: Callable[..., tuple[torch.Tensor, torch.Tensor]],
        backward: Callable[..., Gradients],
    ) -> None:
        num_options = len(schema.split(","))
        self.forward = torch.library.custom_op(
            f"{name}_forward",
            forward,
            mutates_args=(),
            schema=f"(Tensor q, Tensor k, Tensor v, {schema}) -> (Tensor, Tensor)",
        )
        self.backward = torch.library.custom_op(
            f"{name}_backward",
            backward,
            mutates_args=(),
            schema=(
                "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
                f"{schema}) -> (Tensor, Tensor, Tensor)"
            ),
        )
        self.forward.register_fake(_fake_forward)
        self.backward.register_fake(_fake_backward)

        def differentiate(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
            return _differentiate(ctx, grads, self.backward, num_options)

        self.forward.register_autograd(differentiate, setup_context=_setup_context)

        class Plain(torch.autograd.Function):
            """The same without the dispatcher."""

            @staticmethod
            def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
                return forward(*arguments)

            @staticmethod
            def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
                _setup_context(ctx, inputs, output)

            @staticmethod
            @once_differentiable
            def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
                ctx: Any, *grads: torch.Tensor | None
            ) -> tuple[Any, ...]:
                return _differentiate(ctx, grads, backward, num_options)

        self._plain = Plain

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
    ) -> AttentionOutput:
        """Out and lse, differentiable once.

        Skips the dispatcher where no compiler, mode or subclass must see the operator: its first
        call imports the compiler, which takes seconds.
        """
        attend = self._plain.apply if is_plain(q, k, v) else self.forward
        return AttentionOutput(*attend(q, k, v, *options))


def _fake_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _fake_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, *options = inputs
    # Tensors are saved as such, so that hooks on saved tensors see them.
    ctx.is_tensor = [isinstance(x, torch.Tensor) for x in options]
    ctx.constants = [x for x in options if not isinstance(x, torch.Tensor)]
    ctx.save_for_backward(q, k, v, *output, *(x for x in options if isinstance(x, torch.Tensor)))
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any,
    grads: tuple[torch.Tensor | None, ...],
    backward: Callable[..., Gradients],
    num_options: int,
) -> tuple[Any, ...]:
    dout, dlse = grads
    nothing = (None,) * num_options
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    q, k, v, out, lse, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    saved, constants = iter(tensors), iter(ctx.constants)
    options = [next(saved if is_tensor else constants) for is_tensor in ctx.is_tensor]
    return (*backward(dout, dlse, q, k, v, out, lse, *options), *nothing)


def choice_for(
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    has_dropout: bool,
    has_mask: bool,
    block_size: int | None = None,
) -> tuple[str, int]:
    """The backend for q and k, for the text of the options: backward runs the backend of forward.

    `block_size`: Given where a `BlockSparseBackend` gets the lists of whole sequences.

    Raises:
        ValueError: If the named backend, or none, can run.
    """
    return _recorded_choice(
        *(backend, q.device.type, q.device.index, str(q.dtype).removeprefix("torch.")),
        # operator.index fixes a symbolic size to its number; int() would not.
        *(index(q.shape[2]), index(q.shape[3]), index(k.shape[2]), has_dropout, has_mask),
        block_size,
    )


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
    block_size: int | None,
) -> tuple[str, int]:
    inputs = AttentionInputs(
        torch.device(device_type if device_index is None else f"{device_type}:{device_index}"),
        getattr(torch, dtype),
        num_heads,
        head_dim,
        dropout_p=0.5 if has_dropout else 0.0,
        num_kv_heads=num_kv_heads,
        has_key_padding_mask=has_key_padding_mask,
        is_rectangular=True,
        block_size=block_size,
    )
    return record_choice(choose_backend(name, inputs))


# Makes the choice a constant of a compiled graph. `torch.compiler.assume_constant_result` sets the
# same mark, but first imports the compiler and Triton, which takes seconds.
_recorded_choice._dynamo_marked_constant = True  # pyright: ignore
