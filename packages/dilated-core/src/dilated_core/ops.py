"""The operators: dilated attention forward and backward as PyTorch sees them.

Two custom operators with schema, fake implementation and autograd formula, so that
`torch.compile(fullgraph=True)`, activation checkpointing, DDP and FSDP treat them like any
operator of PyTorch. Arguments were checked before (inputs.py), except the values of `cu_seqlens`: a
compiler cannot read values, so the operators read and check them.
"""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch

from dilated_core.backends.contract import (
    AttentionBackend,
    AttentionInputs,
    AttentionOptions,
    Gradients,
)
from dilated_core.backends.registry import choose_backend, record_choice, recorded_backend
from dilated_core.merge import accumulation_dtype
from dilated_core.pattern.branches import DilatedPattern
from dilated_core.strips.call import Call, backward, forward

# Every argument of an operator costs microseconds at each call. Options that are neither tensors
# nor symbolic numbers of a compiler are therefore joined into one string; see `encode_options`.
_OPTIONS = (
    "float scale, float dropout_p, str options, Tensor? dropout_seed, Tensor? key_padding_mask, "
    "Tensor? cu_seqlens"
)


class Settings(NamedTuple):
    """The options of a call, apart from tensors.

    Attributes:
        pattern: The branches.
        is_causal, scale, dropout_p: As users give them; scale is a number.
        head_range: (first, total): which heads of the whole these are.
        max_workspace_bytes: Limit of the memory beyond inputs and results, or None.
        backend: The name that the user gave, or the backend that was chosen.
    """

    pattern: DilatedPattern
    is_causal: bool
    scale: float
    dropout_p: float
    head_range: tuple[int, int] | None
    max_workspace_bytes: int | None
    backend: str | AttentionBackend


def make_call(
    q: torch.Tensor,
    k: torch.Tensor,
    settings: Settings,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Call:
    """The settings with the backend chosen; the tensors are as for `dispatch.attend`."""
    seed, dropout_start = (0, 0) if dropout_seed is None else _read_dropout_seed(dropout_seed)
    inputs = AttentionInputs(
        q.device,
        q.dtype,
        num_heads=q.shape[2],
        head_dim=q.shape[3],
        dropout_p=settings.dropout_p,
        num_kv_heads=k.shape[2],
        has_key_padding_mask=key_padding_mask is not None,
        is_packed=cu_seqlens is not None,
        max_workspace_bytes=settings.max_workspace_bytes,
        seq_len=q.shape[1],
    )
    backend = settings.backend
    options = AttentionOptions(
        settings.is_causal,
        settings.scale,
        settings.dropout_p,
        seed,
        key_padding_mask,
    )
    return Call(
        choose_backend(backend, inputs) if isinstance(backend, str) else backend,
        settings.pattern,
        inputs,
        options,
        settings.head_range or (0, q.shape[2]),
        dropout_start=dropout_start,
    )


def _read_dropout_seed(dropout_seed: torch.Tensor) -> tuple[int, int]:
    """The seed, and the number of the first position."""
    seed, *start = cast("list[int]", dropout_seed.reshape(-1).tolist())  # pyright: ignore
    return seed, start[0] if start else 0


def encode_options(
    pattern: DilatedPattern,
    *,
    is_causal: bool,
    backend: str | tuple[str, int],
    max_workspace_bytes: int | None,
    head_range: tuple[int, int] | None = None,
) -> str:
    """The argument `options` of both operators; `backend` is a name or a `record_choice`."""
    return repr(
        (
            *(pattern.segment_lengths, pattern.dilation_rates),
            *(pattern.head_offsets, pattern.padding),
            *(is_causal, backend, max_workspace_bytes, head_range),
        )
    )


def encode_call(call: Call) -> tuple[float, float, str, torch.Tensor]:
    """The arguments of both operators from `scale` to `dropout_seed`."""
    text = encode_options(
        call.pattern,
        is_causal=call.options.is_causal,
        backend=record_choice(call.backend),
        max_workspace_bytes=call.inputs.max_workspace_bytes,
        head_range=call.head_range,
    )
    seed = torch.tensor([call.options.dropout_seed, call.dropout_start], device="cpu")
    return call.options.scale, call.options.dropout_p, text, seed


@lru_cache(maxsize=1024)
def decode_options(text: str) -> Settings:
    """The settings of a text of `encode_options`, with scale and dropout_p 0."""
    lengths, rates, head_offsets, padding, *others = literal_eval(text)
    is_causal, backend, limit, head_range = others
    pattern = DilatedPattern(lengths, rates, head_offsets=head_offsets, padding=padding)
    if not isinstance(backend, str):
        backend = recorded_backend(backend)
    return Settings(pattern, is_causal, 0.0, 0.0, head_range, limit, backend)


def _decode_call(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Call:
    settings = decode_options(options)._replace(scale=scale, dropout_p=dropout_p)
    return make_call(q, k, settings, dropout_seed, key_padding_mask, cu_seqlens)


def _forward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(_decode_call(q, k, *options), q, k, v, options[-1])


attention_forward = torch.library.custom_op(
    "dilated_core::attention_forward",
    _forward_operator,
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)",
)


@attention_forward.register_fake
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
    call = _decode_call(q, k, *options)
    return backward(call, dout, dlse, q, k, v, out, lse, options[-1])


attention_backward = torch.library.custom_op(
    "dilated_core::attention_backward",
    _backward_operator,
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
) -> Gradients:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    q, k, v, ctx.scale, ctx.dropout_p, ctx.options, *tensor_options = inputs
    ctx.save_for_backward(q, k, v, *output, *tensor_options)
    ctx.set_materialize_grads(False)


def _differentiate_operator(
    ctx: Any, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> tuple[Any, ...]:
    q, k, v, out, lse, *tensor_options = ctx.saved_tensors
    nothing = (None,) * 6
    if dout is None and dlse is None:
        return (None, None, None, *nothing)
    dout = torch.zeros_like(out) if dout is None else dout
    options = (ctx.scale, ctx.dropout_p, ctx.options, *tensor_options)
    return (*attention_backward(dout, dlse, q, k, v, out, lse, *options), *nothing)


attention_forward.register_autograd(_differentiate_operator, setup_context=_setup_context)
