"""The parts of MoBA and NSA as PyTorch operators, so that compilers see one node of each."""

from __future__ import annotations

from ast import literal_eval
from functools import partial
from typing import Any

import torch
from dilated_core import AttentionOptions, AttentionOutput, Gradients
from dilated_core.backends.registry import recorded_backend
from dilated_core.decoding.step import without_autocast
from dilated_core.dispatch import is_plain
from dilated_core.flops import add_formulas

from dilated_sparse.arguments import checked_dropout
from dilated_sparse.execution.sequences import Part, spans_of
from dilated_sparse.operators import (
    AttentionOperator,
    choice_for,
    has_values,
    mapped,
    operator_named,
)
from dilated_sparse.pattern.pairs import pairs_of_budget
from dilated_sparse.presets.choice import moba_choice, nsa_choice
from dilated_sparse.presets.chosen import Call, backward, forward


def attend_chosen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    choice: torch.Tensor,
    block_size: int,
    *,
    scale: float,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Attention of each query to its own block, causally, and to the earlier blocks in `choice`.

    One softmax, differentiable in q, k and v through out and lse.

    Args:
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with K heads.
        choice: `(B, S, G, n)` int64, see `dilated_sparse.presets.choice`.
        block_size: Positions of a block; blocks begin where a sequence begins.
        scale, dropout_p, key_padding_mask, cu_seqlens, backend: As users give them, checked but
            for `dropout_p`.
    """
    dropout_p, dropout_seed = checked_dropout(dropout_p)
    recorded = choice_for(backend, q, k, has_dropout=dropout_seed is not None, has_mask=False)
    options = repr((block_size, recorded))
    return _CHOSEN(
        *(q, k, v, choice, scale, dropout_p, options, dropout_seed, key_padding_mask, cu_seqlens)
    )


def choose_moba(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    count: int,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    """`moba_choice` of each sequence: `(B, S, H, n)`, n at most `count`; −1 in padding."""
    num_earlier = (q.shape[1] + block_size - 1) // block_size - 1
    count = max(0, min(count, num_earlier))
    q, k = q.detach(), k.detach()
    # The first call of any custom operator imports the compiler, which takes seconds.
    choose = _moba_choice if is_plain(q, k) else _counted(_MOBA_CHOICE)
    with without_autocast(q.device.type):
        return choose(q, k, block_size, count, key_padding_mask, cu_seqlens)


def choose_nsa(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, sizes: list[int]
) -> torch.Tensor:
    """`nsa_choice` of q and compressed k; `sizes` are its other arguments in their order."""
    q, k, lse = q.detach(), k.detach(), lse.detach()
    choose = _nsa_choice if is_plain(q, k, lse) else _counted(_NSA_CHOICE)
    with without_autocast(q.device.type):
        return choose(q, k, lse, scale, sizes)


def _counted(choose: Any) -> Any:
    """An operator, which FLOP counters know from now on."""
    if not torch.compiler.is_compiling():
        add_formulas(_CHOICE_FLOPS)
    return choose


def _parts(
    x: torch.Tensor, key_padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> list[Part]:
    B, S = x.shape[:2]
    parts = spans_of(B, S, cu_seqlens, key_padding_mask) if x.numel() else []
    for part in parts:
        if part.key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask hides keys between visible ones; here it may hide padding before "
                "and behind a sequence only."
            )
    return parts


def _moba_choice(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    count: int,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> torch.Tensor:
    choice = q.new_full((*q.shape[:3], count), -1, dtype=torch.int64)
    for rows, span, _ in _parts(q, key_padding_mask, cu_seqlens):
        choice[rows, span] = moba_choice(q[rows, span], k[rows, span], block_size, count)
    return choice


def _nsa_choice(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, sizes: list[int]
) -> torch.Tensor:
    block_size, stride, selection_block_size, count, initial, local = sizes
    return nsa_choice(
        *(q, k, lse),
        block_size=block_size,
        stride=stride,
        scale=scale,
        selection_block_size=selection_block_size,
        count=count,
        num_initial_blocks=initial,
        num_local_blocks=local,
    )


_MOBA_CHOICE = torch.library.custom_op("dilated_sparse::moba_choice", _moba_choice, mutates_args=())
_NSA_CHOICE = torch.library.custom_op("dilated_sparse::nsa_choice", _nsa_choice, mutates_args=())
for _operator in (_MOBA_CHOICE, _NSA_CHOICE):
    _operator.register_vmap(partial(mapped, _operator))


@_MOBA_CHOICE.register_fake
def _(q: torch.Tensor, k: torch.Tensor, block_size: int, count: int, *rest: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:3], count), dtype=torch.int64)


@_NSA_CHOICE.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, scale: float, sizes: list[int]
) -> torch.Tensor:
    return q.new_empty((*q.shape[:2], k.shape[2], sizes[3]), dtype=torch.int64)


def _moba_flops(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    count: int,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    out_val: object,
) -> int:
    """Of the scores: each query with the mean key of each full block."""
    B, S, H, D = q.shape
    lengths = [S]
    if cu_seqlens is not None and has_values(cu_seqlens):
        lengths = [part.span.stop - part.span.start for part in spans_of(B, S, cu_seqlens, None)]
    return 2 * B * H * D * sum(length * (length // block_size) for length in lengths)


def _nsa_flops(q: torch.Tensor, k: torch.Tensor, *rest: Any, out_val: object) -> int:
    """Of the scores: each query with each compressed key."""
    return 2 * q.numel() * k.shape[1]


_CHOICE_FLOPS = {
    operator_named("dilated_sparse::moba_choice"): _moba_flops,
    operator_named("dilated_sparse::nsa_choice"): _nsa_flops,
}


def _call_of(
    choice: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Call:
    block_size, recorded = literal_eval(options)
    seed = 0 if dropout_seed is None else int(dropout_seed)
    backend = recorded_backend(recorded)
    return Call(backend, block_size, AttentionOptions(False, scale, dropout_p, seed))


def _forward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(_call_of(*options), q, k, v, options[0], _parts(q, *options[-2:]))


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
    tensors = (dout, dlse, q, k, v, out, lse, options[0])
    return backward(_call_of(*options), *tensors, _parts(q, *options[-2:]))


def _pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    choice: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> int:
    """For FLOP counters. Without values, as if each query chose as many blocks as it may."""
    block_size, _ = literal_eval(options)
    B, S, H = q.shape[:3]
    known = has_values(choice, cu_seqlens)
    chosen = int((choice >= 0).sum()) if known else choice.numel()
    lengths = [S]
    if cu_seqlens is not None and known:
        lengths = [part.span.stop - part.span.start for part in spans_of(B, S, cu_seqlens, None)]
    own = sum(pairs_of_budget(length, block_size, count=1) for length in lengths)
    return B * H * own + chosen * (H // choice.shape[2]) * block_size


_CHOSEN = AttentionOperator(
    "dilated_sparse::chosen",
    "Tensor choice, float scale, float dropout_p, str options, Tensor? dropout_seed, "
    "Tensor? key_padding_mask, Tensor? cu_seqlens",
    forward=_forward_operator,
    backward=_backward_operator,
    pairs=_pairs,
)
