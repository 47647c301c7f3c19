"""Define a pair of PyTorch operators, forward and backward, so that compilers see one node."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import index
from typing import Any, cast

import torch
from dilated_core import AttentionInputs, AttentionOutput, Gradients
from dilated_core.backends.registry import choose_backend, record_choice
from dilated_core.dispatch import is_plain, is_transformed
from dilated_core.flops import add_formulas
from dilated_core.merge import accumulation_dtype
from dilated_core.transforms import is_batched


class AttentionOperator:
    """Attention as custom operators with schema, fake implementation and autograd formula.

    Args:
        name: Of the operators, as namespace::name; `_forward` and `_backward` are appended.
        schema: Of the arguments after q, k and v, as in a schema of PyTorch.
        forward: From q, k, v and these arguments to out and lse.
        backward: From dout, dlse (or None), q, k, v, out, lse and these arguments to dq, dk, dv.
        pairs: From q, k, v and these arguments to the number of pairs of a query and a key that it
            sees, of all heads and batch rows together, for FLOP counters.

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
        pairs: Callable[..., int],
    ) -> None:
        forward, backward = _without_autocast(forward), _without_autocast(backward)
        self._forward, self._backward = forward, backward
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
            return _differentiate(ctx, grads, self.backward)

        self.forward.register_autograd(differentiate, setup_context=_setup_context)

        # As core counts: 4·D of each pair in forward, and 2.5 times as many in backward.
        def forward_flops(q: torch.Tensor, *arguments: Any, out_val: object) -> int:
            return 4 * q.shape[-1] * pairs(q, *arguments)

        def backward_flops(
            dout: object, dlse: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
            out: object, lse: object, *arguments: Any, out_val: object,
        ) -> int:  # fmt: skip
            return 10 * q.shape[-1] * pairs(q, k, v, *arguments)

        self._formulas = {
            operator_named(f"{name}_forward"): forward_flops,
            operator_named(f"{name}_backward"): backward_flops,
        }

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
    ) -> AttentionOutput:
        """Out and lse, differentiable once.

        Skips the dispatcher where no compiler, mode or subclass must see the operator: its first
        call imports the compiler, which takes seconds. Transforms of torch.func need an autograd
        function too: PyTorch gives a custom operator a tangent of 0 in forward mode.

        Raises:
            RuntimeError: In forward mode, and at a second derivative.
        """
        is_eager = is_plain(q, k, v)
        if is_eager or (not torch.compiler.is_compiling() and is_transformed(q, k, v)):
            return AttentionOutput(*cast(Any, _Attention).apply(self, q, k, v, *options))
        self._register_formulas()
        return AttentionOutput(*self.forward(q, k, v, *options))

    def run_forward(self, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Forward, through the dispatcher if a mode or a transform must see it."""
        if is_plain(*arguments[:3]):
            return self._forward(*arguments)
        self._register_formulas()
        return self.forward(*arguments)

    def run_backward(self, *arguments: Any) -> Gradients:
        """Backward, likewise."""
        dout, dlse, q, k, v = arguments[:5]
        if is_plain(dout, q, k, v) and not is_batched(dout, dlse):
            return self._backward(*arguments)
        self._register_formulas()
        return self.backward(*arguments)

    def _register_formulas(self) -> None:
        if not torch.compiler.is_compiling():
            add_formulas(self._formulas)


def _without_autocast(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with autocast off, which would compute scores in half precision."""

    def wide(*arguments: Any) -> Any:
        with torch.autocast(arguments[0].device.type, enabled=False):
            return run(*arguments)

    return wide


class _Attention(torch.autograd.Function):
    """Out and lse of an `AttentionOperator`, q, k, v and options."""

    @staticmethod
    def forward(operator: AttentionOperator, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return operator.run_forward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.operator = inputs[0]
        _setup_context(ctx, inputs[1:], output)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[Any, ...]:
        operator: AttentionOperator = ctx.operator
        run = operator.run_backward
        if torch.is_grad_enabled():  # create_graph=True, or a transform
            run = partial(cast(Any, _Gradients).apply, operator)
        return None, *_differentiate(ctx, grads, run)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_NO_DERIVATIVE)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return mapped(cast(Any, _Attention).apply, info, in_dims, *arguments)


class _Gradients(torch.autograd.Function):
    """dq, dk and dv of an `AttentionOperator`, from the arguments of its backward."""

    @staticmethod
    def forward(operator: AttentionOperator, *arguments: Any) -> Gradients:
        return operator.run_backward(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        """Nothing is saved: there is no derivative."""

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(_NO_DERIVATIVE)

    jvp = backward

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        return mapped(cast(Any, _Gradients).apply, info, in_dims, *arguments)


_NO_DERIVATIVE = (
    "sparse attention has first derivatives in reverse mode only, so neither forward mode (jvp, "
    "jacfwd, hessian) nor a derivative of its gradient; dilated_core.dilated_attention has both."
)


def mapped(call: Callable[..., Any], info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, Any]:
    """The rule of `torch.vmap` for a function or operator: a call for each mapped entry."""
    results = [
        call(
            *(
                x if dim is None else x.select(dim, i)
                for x, dim in zip(arguments, in_dims, strict=True)
            )
        )
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results), 0
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


def operator_named(name: str) -> Any:
    """The operator `namespace::name` as FLOP counters name it."""
    namespace, _, operator = name.partition("::")
    return getattr(getattr(torch.ops, namespace), operator)


def has_values(*tensors: torch.Tensor | None) -> bool:
    """Whether the numbers of all tensors can be read: none is on the meta device, or fake."""
    return all(x is None or (type(x) is torch.Tensor and not x.is_meta) for x in tensors)


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
) -> tuple[Any, ...]:
    dout, dlse = grads
    nothing = (None,) * len(ctx.is_tensor)
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
