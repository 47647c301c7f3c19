"""Forward and backward as PyTorch operators, so that compilers and checkpointing see one node.

The lists of a pattern are tensor arguments: a compiled graph then serves every pattern and, with
a symbolic S, every length. A rule of a pattern is part of the options, and the operator builds the
pattern of each sequence, so a graph with a rule serves every length too.
"""

from __future__ import annotations

from ast import literal_eval
from functools import lru_cache
from typing import Any

import torch
from dilated_core import AttentionOptions, AttentionOutput, Gradients
from dilated_core.backends.contract import BlockSparseBackend, has_capability
from dilated_core.backends.registry import recorded_backend

from dilated_sparse.execution import run, whole
from dilated_sparse.execution.run import Call
from dilated_sparse.execution.sequences import sequences_of
from dilated_sparse.operators import AttentionOperator, choice_for, has_values
from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.pairs import pairs_of_pattern
from dilated_sparse.pattern.rule import PatternRule


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
    choice = choice_for(
        *(backend, q, k),
        has_dropout=dropout_seed is not None,
        has_mask=key_padding_mask is not None,
        block_size=block_size,
    )
    lists, rule = (None, None), None
    if isinstance(pattern, BlockPattern):
        lists = (pattern.row_offsets, pattern.block_indices)
    else:
        rule = pattern.text
    options = repr((block_size, is_causal, choice, rule))
    return BLOCK_SPARSE(
        *(q, k, v, *lists, scale, dropout_p, options),
        *(dropout_seed, key_padding_mask, cu_seqlens),
    )


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
    call = _call_of(*options)
    return _engine(call).forward(call, q, k, v, options[-1])


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
    call = _call_of(*options)
    return _engine(call).backward(call, dout, dlse, q, k, v, out, lse, options[-1])


def _engine(call: Call) -> Any:
    """The module that runs the call: by lists if the backend walks them, else by tasks."""
    return whole if has_capability(call.backend, BlockSparseBackend) else run


def _pairs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_offsets: torch.Tensor | None,
    block_indices: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    options: str,
    dropout_seed: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> int:
    """For FLOP counters. Masks count as visible, and documents without values as one sequence."""
    block_size, is_causal, _, rule = _decode(options)
    if row_offsets is not None and block_indices is not None:
        if not has_values(row_offsets, block_indices):
            return q.shape[0] * q.shape[2] * block_indices.shape[0] * block_size**2
        rule = BlockPattern.of_lists(row_offsets.cpu(), block_indices.cpu())
    assert rule is not None
    known = cu_seqlens if has_values(cu_seqlens) else None
    parts = sequences_of(q, rule, block_size, cu_seqlens=known, key_padding_mask=None)
    return sum(
        len(range(*part.rows.indices(q.shape[0])))
        * pairs_of_pattern(
            part.pattern,
            part.span.stop - part.span.start,
            block_size,
            is_causal=is_causal,
            num_heads=q.shape[2],
        )
        for part in parts
    )


BLOCK_SPARSE = AttentionOperator(
    "dilated_sparse::block_sparse",
    # Every argument of an operator costs microseconds at each call. Options that are neither
    # tensors nor symbolic numbers of a compiler are therefore joined into one string.
    "Tensor? row_offsets, Tensor? block_indices, float scale, float dropout_p, str options, "
    "Tensor? dropout_seed, Tensor? key_padding_mask, Tensor? cu_seqlens",
    forward=_forward_operator,
    backward=_backward_operator,
    pairs=_pairs,
)
"""Block-sparse attention as operators."""
