"""What a model hands to its attention and dilated attention cannot honour: each raises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# Read by the attention function, or without effect on attention.
_HONOURED = frozenset(
    {
        "position_ids",
        "is_causal",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_router_logits",
        "num_items_in_batch",
        "logits_to_keep",
        "position_embeddings",
        "deterministic",
    }
)
_REASONS = {
    "sliding_window": (
        "a sliding window is a pattern of its own, so leave it out of the config "
        "(config.sliding_window = None, config.use_sliding_window = False)"
    ),
    "softcap": "no backend caps scores, so use a model without soft-capping",
    "s_aux": "no backend has attention sinks, so use a model without them",
    "sinks": "no backend has attention sinks, so use a model without them",
    "position_bias": "no backend adds a bias to scores, so use a model with rotary positions",
    "output_attentions": (
        "the attention matrix is never made; dilated_core.attention_rows computes single rows"
    ),
}


def check_layer(module: nn.Module, num_heads: int) -> None:
    """Refuse layers that attend to another sequence, and heads that are spread over devices.

    Raises:
        ValueError: If it is such a layer.
    """
    config: Any = getattr(module, "config", None)
    name = type(module).__name__
    is_cross = getattr(module, "is_cross_attention", False) or "CrossAttention" in name
    if is_cross or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} belongs to a model with cross-attention; a pattern has one sequence, so "
            f"attn_implementation='dilated' is for decoder-only and encoder-only models."
        )
    total = getattr(config, "num_attention_heads", None)
    if isinstance(total, int) and num_heads < total:
        raise ValueError(
            f"{name} has {num_heads} of {total} heads, as under tensor parallelism; each head's "
            f"offset follows from its number among all, so spread the sequence instead, or use "
            f"another attention."
        )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse keyword arguments of an attention function that would change its result.

    Raises:
        ValueError: Naming the first of them.
    """
    for name, value in given.items():
        if value is None or value is False or name in _HONOURED:
            continue
        shown = tuple(value.shape) if isinstance(value, Tensor) else value
        reason = _REASONS.get(name, "it is unknown here and might change the attention")
        raise ValueError(
            f"attn_implementation='dilated' got {name}={shown!r}, which it cannot honour: {reason}."
        )


def check_mask(mask: object) -> Tensor | None:
    """The 2-D mask `(B, columns)` that the mask function returned, or None.

    Raises:
        ValueError: If it is another mask, which a caller has prepared.
    """
    if mask is None:
        return None
    shape = tuple(getattr(mask, "shape", ()))
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype.is_floating_point:
        raise ValueError(
            f"attention_mask is a {type(mask).__name__} of shape {shape}; it must be 2-D "
            f"(batch, columns) with 1 for tokens and 0 for padding, because the pattern decides "
            f"which keys a query sees."
        )
    return mask.bool()
