"""Checks that all attention functions of the package share, and the seed of dropout."""

from __future__ import annotations

import torch
from dilated_core.checks import check_bool
from dilated_core.inputs import (
    cast_for_autocast,
    check_cu_seqlens,
    check_dropout,
    check_inputs,
    check_key_padding_mask,
)


def checked_tensors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    is_causal: bool,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> list[torch.Tensor]:
    """q, k and v in the dtype of autocast, if they and the masks fit one another.

    Args, errors: As for `block_sparse_attention`.
    """
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask and cu_seqlens are both given; packed documents have no padding, "
                "so give one of the two."
            )
    check_bool("is_causal", is_causal)
    q, k, v = cast_for_autocast(q, k, v)
    check_inputs(q, k, v, is_packed=cu_seqlens is not None)
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, q)
    return [q, k, v]


def checked_dropout(dropout_p: float) -> tuple[float, torch.Tensor | None]:
    """The probability, and a seed, which is an int64 scalar on the CPU; None without dropout.

    A tensor, drawn at each call: torch.manual_seed determines it, a compiled graph draws a new one
    at each call, and activation checkpointing draws the same one when it recomputes.

    Raises:
        TypeError, ValueError: If `dropout_p` is no probability below 1.
    """
    dropout_p = check_dropout(dropout_p)
    return dropout_p, torch.randint(2**62, (), device="cpu") if dropout_p else None
