"""Masks as PyTorch's own layers pass them: which can be honoured, and what they mean."""

from __future__ import annotations

import torch

from dilated_core.checks import check_bool


def check_mask_is_causal(mask: torch.Tensor, query: torch.Tensor, is_causal: bool) -> None:
    """Refuse every `attn_mask` but the causal one that accompanies `is_causal=True`.

    Args:
        mask: `(S, S)`, bool or floating.
        query: `(B, S, E)` or `(T, E)`.
        is_causal: The argument beside the mask.

    Raises:
        ValueError: If it is another mask.
    """
    S = query.shape[-2]
    message = (
        f"attn_mask has shape {tuple(mask.shape)} with is_causal={is_causal}; the pattern decides "
        f"which keys a query sees, so pass attn_mask=None, and is_causal=True for causality"
        f"{_batch_first_hint(query, mask.shape == (query.shape[0],) * 2)}."
    )
    if not check_bool("is_causal", is_causal) or mask.shape != (S, S):
        raise ValueError(message)
    causal = torch.ones(S, S, dtype=torch.bool, device=mask.device).triu(1)
    if mask.dtype == torch.bool:
        is_the_causal_one = (mask == causal).all()
    else:
        is_the_causal_one = (mask == torch.where(causal, -torch.inf, 0.0)).all()
    _require(is_the_causal_one, message)


def as_bool_mask(key_padding_mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The mask as bool, from bool or from 0 and −inf, as PyTorch's layers convert bool masks.

    Args:
        key_padding_mask: `(B, S)`.
        query: `(B, S, E)` or `(T, E)`.

    Raises:
        ValueError: If the shape does not fit or a value is neither 0 nor −inf.
    """
    shape = query.shape[:-1]
    if query.dim() == 3 and key_padding_mask.shape != shape:
        raise ValueError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)} and query "
            f"{tuple(query.shape)}; it must be (batch, sequence)"
            f"{_batch_first_hint(query, key_padding_mask.shape == shape[::-1])}."
        )
    if not key_padding_mask.is_floating_point():
        return key_padding_mask
    hidden = key_padding_mask == -torch.inf
    _require(
        (hidden | (key_padding_mask == 0)).all(),
        "key_padding_mask holds values other than 0 and -inf; scores cannot be biased, so give a "
        "bool mask, True for keys to ignore.",
    )
    return hidden


def _batch_first_hint(query: torch.Tensor, fits_the_transposed: bool) -> str:
    """What to write if a mask fits inputs whose first dimension is the sequence."""
    if query.dim() != 3 or not fits_the_transposed:
        return ""
    return (
        ". It fits inputs of (sequence, batch, embed_dim): this module takes (batch, sequence, "
        "embed_dim), so build the layer around it with batch_first=True"
    )


def _require(condition: torch.Tensor, message: str) -> None:
    """Raise unless a tensor of one bool is true; in a compiled graph, when the graph runs.

    Raises:
        ValueError: If it is false. A compiled graph, which cannot branch on values, raises a
            RuntimeError.
    """
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(condition, message)
    elif not condition:
        raise ValueError(message)
