"""The mask function that transformers calls once in each forward of a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PACKED_PARTS = {
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
}


def dilated_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    device: torch.device | None = None,
    **_: Any,
) -> Tensor | None:
    """What the attention function gets as its mask: which columns are tokens.

    The pattern and `position_ids` decide which tokens see each other, so no `(S, S)` mask is made.

    Args:
        batch_size: B.
        q_length: n.
        kv_length: Columns of the keys that the cache returns, of which a static cache has not
            written the last ones yet.
        mask_function: Which key a query sees. Causal, bidirectional and packed are what the
            attention function does by itself.
        attention_mask: `(B, columns)` bool, or None: all columns are tokens.
        q_offset: Columns before the queries.
        kv_offset: Columns that the cache has dropped.
        device: Of the mask.

    Returns:
        `(B, columns)` bool for the columns that are written; None if all are, and are tokens.

    Raises:
        ValueError: If the mask has another size, or `mask_function` is another one.
    """
    if not _is_known(mask_function):
        raise ValueError(
            f"attn_implementation='dilated' got the mask function "
            f"{getattr(mask_function, '__qualname__', mask_function)!r}, which it cannot honour: a "
            f"sliding window, chunks, blocks and functions of a caller are patterns of their own. "
            f"It must be causal or bidirectional, so take them out of the model's config."
        )
    if int(kv_offset):
        raise ValueError(
            f"the cache has dropped the first {int(kv_offset)} tokens; segments count from the "
            f"start of a sequence, so use a cache that keeps them (DynamicCache or StaticCache)."
        )
    written = int(q_offset) + q_length
    if attention_mask is None:
        if written == kv_length:
            return None
        return torch.ones(batch_size, written, dtype=torch.bool, device=device)
    if attention_mask.shape[-1] != written:
        raise ValueError(
            f"attention_mask has {attention_mask.shape[-1]} columns; it must have {written}, one "
            f"for each of {int(q_offset)} tokens before and {q_length} new ones."
        )
    if written == kv_length and bool(attention_mask.all()):
        return None
    return attention_mask


def _is_known(mask_function: Callable[..., Any]) -> bool:
    from transformers import masking_utils

    if mask_function in (
        masking_utils.causal_mask_function,
        masking_utils.bidirectional_mask_function,
    ):
        return True
    # What transformers makes where position_ids restart; the attention function finds the same.
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return False
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    inner = [inspect.getclosurevars(part).nonlocals.get("mask_function") for part in parts]
    return {part.__qualname__ for part in parts} == _PACKED_PARTS and (
        masking_utils.causal_mask_function in inner
    )
