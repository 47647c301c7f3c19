"""Attention over a selection as operators; its lists are tensors, so one graph serves all."""

from __future__ import annotations

from ast import literal_eval
from typing import Any

import torch
from dilated_core import AttentionOptions, AttentionOutput, Gradients
from dilated_core.backends.registry import recorded_backend

from dilated_sparse.execution.selected import SelectedCall, backward, forward
from dilated_sparse.operators import AttentionOperator, choice_for, has_values
from dilated_sparse.pattern.pairs import pairs_of_blocks
from dilated_sparse.pattern.selection import BlockSelection


def attend_selected(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    selection: BlockSelection,
    *,
    block_size: int,
    is_causal: bool,
    scale: float,
    dropout_p: float = 0.0,
    dropout_seed: torch.Tensor | None = None,
    key_padding_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """Contiguous out `(B, S, H, D)` and lse `(B, S, H)`, differentiable.

    Args:
        q: `(B, S, H, D)`.
        k, v: `(B, S, K, D)`.
        selection: Of B batch rows, K heads and ⌈S / block_size⌉ blocks.
        block_size, is_causal, scale, dropout_p, key_padding_mask, backend: As for
            `block_sparse_attention`, checked; scale is a number.
        dropout_seed: int64 scalar on the CPU; None without dropout.

    Raises:
        ValueError: If no backend can run.
    """
    choice = choice_for(
        *(backend, q, k),
        has_dropout=dropout_seed is not None,
        has_mask=key_padding_mask is not None,
    )
    options = repr((block_size, is_causal, choice))
    return SELECTED(
        *(q, k, v, selection.counts, selection.block_indices, scale, dropout_p, options),
        *(dropout_seed, key_padding_mask),
    )


def _call_of(
    counts: torch.Tensor,
    block_indices: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
) -> SelectedCall:
    block_size, is_causal, choice = literal_eval(options)
    seed = 0 if dropout_seed is None else int(dropout_seed)
    return SelectedCall(
        recorded_backend(choice),
        BlockSelection(counts, block_indices),
        block_size,
        AttentionOptions(is_causal, scale, dropout_p, seed, key_padding_mask),
    )


def _forward_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return forward(_call_of(*options), q, k, v)


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
    return backward(_call_of(*options), dout, dlse, q, k, v, out, lse)


def _pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    block_indices: torch.Tensor,
    scale: float,
    dropout_p: float,
    options: str,
    *masks: torch.Tensor | None,
) -> int:
    """For FLOP counters. Without values, as if each row kept as many blocks as it has room for."""
    block_size, is_causal, _ = literal_eval(options)
    groups = q.shape[2] // k.shape[2]
    if not has_values(counts, block_indices):
        return groups * block_indices.numel() * block_size**2
    rows = torch.arange(counts.shape[2], device=counts.device)[:, None].expand(block_indices.shape)
    there = block_indices >= 0
    pairs = pairs_of_blocks(
        *(rows[there], block_indices[there].long(), q.shape[1], block_size), is_causal=is_causal
    )
    return groups * pairs


SELECTED = AttentionOperator(
    "dilated_sparse::selected",
    "Tensor counts, Tensor block_indices, float scale, float dropout_p, str options, "
    "Tensor? dropout_seed, Tensor? key_padding_mask",
    forward=_forward_operator,
    backward=_backward_operator,
    pairs=_pairs,
)
"""Attention over a selection as operators."""
