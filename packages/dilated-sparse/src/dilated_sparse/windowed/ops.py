"""Forward and backward as PyTorch operators, so that compilers and checkpointing see one node."""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import Any

import torch
from dilated_core import AttentionOptions, AttentionOutput, DilatedPattern, Gradients
from dilated_core.backends.registry import recorded_backend
from dilated_core.inputs import read_document_bounds

from dilated_sparse.operators import AttentionOperator, choice_for, has_values
from dilated_sparse.windowed.pairs import windowed_pairs
from dilated_sparse.windowed.plan import Overlap
from dilated_sparse.windowed.run import Call, backward, forward


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern | None,
    *,
    window: int,
    overlap: Overlap,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    head_range: tuple[int, int] | None,
    backend: str,
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, differentiable.

    Args:
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        k, v: The same with H_kv heads.
        pattern, window, overlap, is_causal, scale, dropout_p, key_padding_mask, cu_seqlens,
            head_range, backend: As users give them, checked; scale is a number.
        dropout_seed: int64 scalar on the CPU; None without dropout.

    Raises:
        ValueError: If no backend can run.
    """
    choice = choice_for(
        *(backend, q, k),
        has_dropout=dropout_seed is not None,
        has_mask=key_padding_mask is not None,
    )
    branches = None
    if pattern is not None:
        branches = (
            *(pattern.segment_lengths, pattern.dilation_rates),
            *(pattern.head_offsets, pattern.padding),
        )
    options = repr((branches, window, overlap, is_causal, head_range, choice))
    return WINDOWED(
        *(q, k, v, scale, dropout_p, options, dropout_seed, key_padding_mask, cu_seqlens)
    )


@lru_cache(maxsize=1024)
def _decode(text: str) -> Call:
    """The call of a text, without scale, dropout and mask."""
    branches, window, overlap, is_causal, head_range, choice = literal_eval(text)
    pattern = None
    if branches is not None:
        lengths, rates, head_offsets, padding = branches
        pattern = DilatedPattern(lengths, rates, head_offsets=head_offsets, padding=padding)
    options = AttentionOptions(is_causal, scale=0.0)
    return Call(recorded_backend(choice), pattern, window, overlap, head_range, options)


def _call_of(
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> Call:
    call = _decode(options)
    seed = 0 if dropout_seed is None else int(dropout_seed)
    causal = call.options.is_causal
    return call._replace(options=AttentionOptions(causal, scale, dropout_p, seed, key_padding_mask))


def _forward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(_call_of(*options), q, k, v, options[-1])


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
    return backward(_call_of(*options), dout, dlse, q, k, v, out, lse, options[-1])


def _pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> int:
    """For FLOP counters. Masks count as visible, and documents without values as one sequence."""
    call = _decode(options)
    B, S, H = q.shape[:3]
    lengths = [S]
    if cu_seqlens is not None and has_values(cu_seqlens):
        lengths = [int(length) for length in read_document_bounds(cu_seqlens, S).diff()]
    return B * sum(
        windowed_pairs(
            *(call.pattern, call.window, length, H),
            is_causal=call.options.is_causal,
            overlap=call.overlap,
            head_range=call.head_range,
        )
        for length in lengths
    )


WINDOWED = AttentionOperator(
    "dilated_sparse::windowed",
    "float scale, float dropout_p, str options, Tensor? dropout_seed, Tensor? key_padding_mask, "
    "Tensor? cu_seqlens",
    forward=_forward_operator,
    backward=_backward_operator,
    pairs=_pairs,
)
"""Windowed dilated attention as operators."""
