"""The attention function that transformers calls in each layer.

B batch, H heads, H_kv heads of k and v, D head_dim, n columns of queries, N columns of keys.
"""

from __future__ import annotations

from typing import Any

import torch
from dilated_core import (
    AttentionInputs,
    AttentionOptions,
    DilatedAttentionConfig,
    Span,
    attend_,
    choose_backend,
    dilated_attention,
    empty_partial,
    plan_problems,
)
from dilated_core.inputs import cast_for_autocast, check_scale
from dilated_core.strips.view import is_batch_dense, viewable
from torch import Tensor, nn

from dilated_models.huggingface.columns import Packed, find_continued, find_documents
from dilated_models.huggingface.pattern import attention_of
from dilated_models.huggingface.refusals import check_arguments, check_layer, check_mask

# The argument by which a layer of a DilatedCache is handed on.
CACHE_LAYER = "dilated_cache_layer"


@torch.compiler.disable  # what it does follows from values of position_ids
def dilated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Dilated attention of a layer of a transformers model.

    Args:
        module: The layer; its `config` has the pattern, unless `dilated_pattern` has set one.
        query: `(B, H, n, D)`.
        key, value: `(B, H_kv, N, D)`, with the tokens of the cache before the new ones; with a
            `DilatedCache` the new ones.
        attention_mask: As `dilated_mask` returns it.
        dropout: Probability of dropping an attention probability.
        scaling: Factor of the scores; 1/√D if None.
        **arguments: `position_ids`, `is_causal`, and what models hand on.

    Returns:
        `(B, n, H, D)`, 0 for padding; and None, because no attention matrix is made.

    Raises:
        ValueError: If something cannot be honoured.
    """
    bounded = arguments.pop(CACHE_LAYER, None)
    check_layer(module, query.shape[1])
    check_arguments(arguments)
    attention = attention_of(getattr(module, "config", None))
    visible = check_mask(attention_mask)
    is_causal = _is_causal(module, arguments.get("is_causal"))
    position_ids = _positions(arguments.get("position_ids"), query)
    if bounded is not None:
        _check_bounded(is_causal, dropout)
        rows = (x.transpose(1, 2) for x in cast_for_autocast(query, key, value))
        return bounded.attend(*rows, position_ids, visible, attention, scaling), None
    if visible is not None:
        # A static cache returns columns that are not written yet.
        key, value = key[:, :, : visible.shape[1]], value[:, :, : visible.shape[1]]
    q, k, v = (x.transpose(1, 2) for x in cast_for_autocast(query, key, value))
    n, N = q.shape[1], k.shape[1]
    if visible is not None and (len(visible) != len(q) or visible.shape[1] != N):
        raise ValueError(
            f"attention_mask has shape {tuple(visible.shape)} and the keys are {N} columns of "
            f"{len(q)} sequences; it must have one value for each of them."
        )
    if visible is not None and bool(visible.all()):
        visible = None
    if n == N:
        packed = find_documents(position_ids, visible, len(q), n)
        _check_documents(packed, arguments.get("cu_seq_lens_q"), len(q), n)
        return _attend(q, k, v, packed, attention, is_causal, scaling, dropout), None
    if not is_causal or n > N:
        raise ValueError(
            f"{type(module).__name__} has {n} queries and {N} keys"
            f"{'' if is_causal else ' and is not causal'}; they must be one sequence, or causal "
            f"queries after the tokens of a cache."
        )
    rows = find_continued(position_ids, visible, n, N)
    # Attention through a cache has no gradient and drops nothing: whole sequences have both.
    is_training = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    continued = _continue_whole if is_training or dropout else _continue
    options = (attention, scaling, dropout)
    if rows is None:
        return continued(q, k, v, *options), None
    out = q.new_zeros(q.shape)
    for b, (tokens, count) in enumerate(rows):
        if count:
            new = tokens[-count:] - (N - n)
            parts = q[b : b + 1, new], k[b : b + 1, tokens], v[b : b + 1, tokens]
            out = out.index_put((new.new_tensor(b), new), continued(*parts, *options)[0])
    return out, None


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: Packed | None,
    attention: DilatedAttentionConfig,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """Attention inside each sequence, without tokens before."""
    at = None if packed is None else (packed.rows, packed.columns)
    out = dilated_attention(
        q if at is None else q[at],
        k if at is None else k[at],
        v if at is None else v[at],
        attention.pattern,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        cu_seqlens=None if packed is None else packed.cu_seqlens,
        backend=attention.backend,
    )
    return out if at is None else q.new_zeros(q.shape).index_put(at, out)


def _continue(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: DilatedAttentionConfig,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """The last n queries of N positions; costs what their own segments have. No gradient."""
    B, n, H, D = q.shape
    N, H_kv = k.shape[1:3]
    inputs = AttentionInputs(
        q.device, q.dtype, H, D, num_kv_heads=H_kv, seq_len=n, is_rectangular=True
    )
    q, k, v = (viewable(x) for x in (q, k, v))
    problems = plan_problems(
        attention.pattern,
        queries=Span(N - n, N),
        keys=Span(0, N),
        seq_len=N,
        num_heads=H,
        num_kv_heads=H_kv,
        batch_size=B,
        is_causal=True,
        is_batch_dense=is_batch_dense(q, k, v),
    )
    into = empty_partial(q.shape, dtype=q.dtype, device=q.device)
    options = AttentionOptions(is_causal=True, scale=check_scale(scale, D), dropout_p=dropout_p)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        attend_(into, problems, q, k, v, options, backend=choose_backend(attention.backend, inputs))
    return into.out.to(q.dtype)


def _continue_whole(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention: DilatedAttentionConfig,
    scale: float | None,
    dropout_p: float,
) -> Tensor:
    """`_continue` with a gradient and dropout; costs what the whole sequence does."""
    past = k.shape[1] - q.shape[1]
    whole = nn.functional.pad(q, (0, 0, 0, 0, past, 0))
    return _attend(whole, k, v, None, attention, True, scale, dropout_p)[:, past:]


def _check_bounded(is_causal: bool, dropout: float) -> None:
    if not is_causal:
        raise ValueError(
            "is_causal is False; a DilatedCache is for causal attention, so use no cache."
        )
    if dropout:
        raise ValueError(
            f"the dropout of attention is {dropout}; a DilatedCache drops nothing, so call "
            f"model.eval(), or use a DynamicCache."
        )


def _is_causal(module: nn.Module, given: bool | None) -> bool:
    of_layer = bool(getattr(module, "is_causal", True))
    if given and not of_layer:
        raise ValueError(
            f"is_causal is True and {type(module).__name__} is bidirectional; leave it out, or "
            f"make the model a decoder (config.is_decoder = True)."
        )
    return of_layer if given is None else bool(given)


def _positions(position_ids: object, query: Tensor) -> Tensor | None:
    """`(1, n)` or `(B, n)` on the device of the query, checked."""
    if position_ids is None:
        return None
    B, _, n, _ = query.shape
    shape = tuple(position_ids.shape) if isinstance(position_ids, Tensor) else None
    if not isinstance(position_ids, Tensor) or shape not in ((1, n), (B, n)):
        raise ValueError(
            f"position_ids is a {type(position_ids).__name__} of shape {shape}; it must be of "
            f"shape {(1, n)} or {(B, n)}, one position for each token."
        )
    return position_ids.to(query.device)


def _check_documents(packed: Packed | None, given: object, B: int, n: int) -> None:
    """Refuse documents of a collator that position_ids do not have."""
    if not isinstance(given, Tensor):
        return
    if packed is None:
        found = torch.arange(0, B * n + 1, n or 1, device=given.device)
    else:
        found = packed.cu_seqlens.to(given.device)
    if not torch.equal(found, given.flatten().to(found.dtype)):
        raise ValueError(
            f"cu_seq_lens_q is {given.tolist()} and position_ids restart at {found.tolist()}; they "
            f"must agree, so pass position_ids that restart at 0 with each document."
        )
