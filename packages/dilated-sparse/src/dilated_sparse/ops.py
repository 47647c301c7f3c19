"""Forward and backward as PyTorch operators, so that compilers and checkpointing see one node.

The lists of a pattern are tensor arguments: a compiled graph then serves every pattern and, with
a symbolic S, every length. A rule of a pattern is part of the options, and the operator builds the
pattern of each sequence, so a graph with a rule serves every length too.
"""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Callable
from functools import lru_cache
from operator import index
from typing import Any

import torch
from dilated_core import AttentionInputs, AttentionOptions, AttentionOutput, Gradients
from dilated_core.backends.registry import choose_backend, record_choice, recorded_backend
from dilated_core.dispatch import is_plain
from dilated_core.merge import accumulation_dtype
from torch.autograd.function import once_differentiable

from dilated_sparse.execution.run import Call, backward, forward
from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.rule import PatternRule

# Every argument of an operator costs microseconds at each call. Options that are neither tensors
# nor symbolic numbers of a compiler are therefore joined into one string.
_OPTIONS = (
    "Tensor? row_offsets, Tensor? block_indices, float scale, float dropout_p, str options, "
    "Tensor? dropout_seed, Tensor? key_padding_mask, Tensor? cu_seqlens"
)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: BlockPattern | PatternRule,
    *,
    block_size: int,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, differentiable.

    Args:
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with H_kv heads.
        pattern: The kept blocks, or their rule.
        block_size, is_causal, scale, dropout_p, key_padding_mask, cu_seqlens, backend: As users
            give them, checked; scale is a number.
        dropout_seed: int64 scalar on the CPU; None without dropout.

    Raises:
        ValueError: If no backend can run, or the pattern is for another length.
    """
    choice = _recorded_choice(
        *(backend, q.device.type, q.device.index, str(q.dtype).removeprefix("torch.")),
        # operator.index fixes a symbolic size to its number; int() would not.
        *(index(q.shape[2]), index(q.shape[3]), index(k.shape[2])),
        *(dropout_seed is not None, key_padding_mask is not None),
    )
    lists, rule = (None, None), None
    if isinstance(pattern, BlockPattern):
        lists = (pattern.row_offsets, pattern.block_indices)
    else:
        rule = pattern.text
    arguments = (
        *(q, k, v, *lists, scale, dropout_p),
        *(repr((block_size, is_causal, choice, rule)), dropout_seed, key_padding_mask, cu_seqlens),
    )
    # The first call of any custom operator imports the compiler, which takes seconds.
    out, lse = (_PlainAttention.apply if is_plain(q, k, v) else block_sparse_forward)(*arguments)
    return AttentionOutput(out, lse)


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
) -> tuple[str, int]:
    """The chosen backend, for the text of the options: backward runs the backend of forward."""
    inputs = AttentionInputs(
        torch.device(device_type if device_index is None else f"{device_type}:{device_index}"),
        getattr(torch, dtype),
        num_heads,
        head_dim,
        dropout_p=0.5 if has_dropout else 0.0,
        num_kv_heads=num_kv_heads,
        has_key_padding_mask=has_key_padding_mask,
        is_rectangular=True,
    )
    return record_choice(choose_backend(name, inputs))


# Makes the choice a constant of a compiled graph. `torch.compiler.assume_constant_result` sets the
# same mark, but first imports the compiler and Triton, which takes seconds.
_recorded_choice._dynamo_marked_constant = True  # pyright: ignore


@lru_cache(maxsize=1024)
def _decode(text: str) -> tuple[int, bool, Any, PatternRule | None]:
    """block_size, is_causal, the backend and the rule of the pattern."""
    block_size, is_causal, choice, rule = literal_eval(text)
    rule = None if rule is None else PatternRule(rule)
    return block_size, is_causal, recorded_backend(choice), rule


def _call_of(
    row_offsets: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Call:
    block_size, is_causal, backend, pattern = _decode(options)
    seed = 0 if dropout_seed is None else int(dropout_seed)
    if pattern is None:
        assert row_offsets is not None
        assert block_indices is not None
        pattern = BlockPattern.of_lists(row_offsets, block_indices)
    return Call(
        backend,
        pattern,
        block_size,
        AttentionOptions(is_causal, scale, dropout_p, seed, key_padding_mask),
    )


def _forward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(q.device.type, enabled=False):
        return forward(_call_of(*options), q, k, v, options[-1])


block_sparse_forward = torch.library.custom_op(
    "dilated_sparse::forward",
    _forward_operator,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)


@block_sparse_forward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=accumulation_dtype(q.dtype))


def _backward_operator(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *options: Any,
) -> Gradients:
    with torch.autocast(q.device.type, enabled=False):
        return backward(_call_of(*options), dout, dlse, q, k, v, out, lse, options[-1])


block_sparse_backward = torch.library.custom_op(
    "dilated_sparse::backward",
    _backward_operator,
    mutates_args=(),
    schema=(
        "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
        f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)"
    ),
)


@block_sparse_backward.register_fake
def _(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, offsets, indices, ctx.scale, ctx.dropout_p, ctx.options, *tensors = inputs
    ctx.save_for_backward(q, k, v, *output, offsets, indices, *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    differentiate: Callable[..., Gradients],
) -> tuple[Any, ...]:
    nothing = (None,) * 8
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    q, k, v, out, lse, offsets, indices, *tensors = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    options = (offsets, indices, ctx.scale, ctx.dropout_p, ctx.options, *tensors)
    return (*differentiate(dout, dlse, q, k, v, out, lse, *options), *nothing)


def _differentiate_operator(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[Any, ...]:
    return _differentiate(ctx, dout, dlse, block_sparse_backward)


block_sparse_forward.register_autograd(_differentiate_operator, setup_context=_setup_context)


class _PlainAttention(torch.autograd.Function):
    """The same without the dispatcher, where no compiler, mode or subclass must see it."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return _forward_operator(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _setup_context(ctx, inputs, output)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
    ) -> tuple[Any, ...]:
        return _differentiate(ctx, dout, dlse, _backward_operator)
