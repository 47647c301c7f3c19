"""Dilated attention as functions: check the inputs, attend, return the merged result."""

from __future__ import annotations

import inspect
from typing import Never

import torch

from dilated_core.checks import check_bool, check_head_range, check_names
from dilated_core.dispatch import attend
from dilated_core.inputs import (
    cast_for_autocast,
    check_backend_name,
    check_cu_seqlens,
    check_dropout,
    check_inputs,
    check_key_padding_mask,
    check_max_workspace_bytes,
    check_scale,
)
from dilated_core.merge import AttentionOutput
from dilated_core.ops import Settings
from dilated_core.pattern.branches import DilatedPattern, check_pattern


def dilated_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
    **unknown: Never,
) -> AttentionOutput:
    """`dilated_attention` that also returns the log of the softmax denominators.

    `merge_partials` merges partial results over different keys by their lse. Gradients flow through
    out and lse.

    Args, errors: As for `dilated_attention`.

    Returns:
        `out` `(B, S, H, D)` in the dtype of q, and `lse` `(B, S, H)`, natural logarithm, float32
        (float64 for float64 inputs).
    """
    if unknown:
        check_names("dilated_attention_with_lse", unknown, _ARGUMENTS)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask and cu_seqlens are both given; packed documents have no padding, "
                "so give one of the two."
            )
    check_bool("is_causal", is_causal)
    q, k, v = cast_for_autocast(q, k, v)
    check_pattern(pattern)
    check_inputs(q, k, v, is_packed=cu_seqlens is not None)
    check_max_workspace_bytes(max_workspace_bytes)
    check_backend_name(backend)
    if head_range is not None:
        head_range = check_head_range(head_range, q.shape[-2])
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, q)
        key_padding_mask = key_padding_mask.contiguous()
    dropout_p = check_dropout(dropout_p)
    # The seed is a tensor drawn here: torch.manual_seed determines it, a compiled graph draws a new
    # one at each call, and activation checkpointing draws the same one when it recomputes.
    dropout_seed = torch.randint(2**62, (), device="cpu") if dropout_p else None
    if cu_seqlens is not None:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    scale = check_scale(scale, q.shape[-1])
    settings = Settings(
        pattern, is_causal, scale, dropout_p, head_range, max_workspace_bytes, backend
    )
    out, lse = attend(q, k, v, settings, dropout_seed, key_padding_mask, cu_seqlens)
    return AttentionOutput(out, lse) if cu_seqlens is None else AttentionOutput(out[0], lse[0])


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    max_workspace_bytes: int | None = None,
    backend: str = "auto",
    **unknown: Never,
) -> torch.Tensor:
    """Attention of each query over the keys that the pattern's branches select for it.

    One softmax per query over the multiset union of the keys of its branches, which is the paper's
    mixing of branches by their softmax denominators (arXiv 2307.02486, eq. 9–10), exactly, forward
    and backward. Compute and memory are linear in S for fixed segments.

    Under `torch.autocast` q, k and v are cast to its dtype, as PyTorch's own attention does;
    otherwise no tensor is ever cast.

    Args:
        q: `(B, S, H, D)`: batch, sequence, heads, head_dim. Any S, any strides. With `cu_seqlens`
            `(T, H, D)`, T being the positions of all documents together; k, v likewise.
        k, v: `(B, S, H_kv, D)`; H_kv divides H, and H/H_kv consecutive heads of q share one of k
            and v (grouped-query attention). One floating dtype and one device with q.
        pattern: Segment lengths, dilation rates, head offsets and padding.
        is_causal: Query i sees only keys j ≤ i.
        scale: Factor of the scores; 1/√D if None.
        dropout_p: Probability of dropping each attention probability; the others are divided by
            1 − `dropout_p`. Pass 0 when not training. Reproducible under `torch.manual_seed`.
        key_padding_mask: `(B, S)` bool, True for keys that nobody sees, such as padding; any
            positions. Its rows are queries all the same. A query left without keys gives 0.
        cu_seqlens: `(N + 1,)` int32 or int64, where each of N documents that are packed one after
            another begins, and where the last one ends: from 0 to T, not decreasing. Each document
            is a sequence of its own, and segments restart with it. A document may be empty.
        head_range: (first, total), if q, k and v hold the heads from `first` on of `total`, as when
            heads are spread over devices: they then have the offsets of these heads. None: (0, H).
        max_workspace_bytes: Memory that forward may take beyond its inputs and results, in bytes.
            Work is cut by heads, batch rows and segments until it fits; a limit that no cut can
            keep is refused. None: no limit in float32 and float64, about the size of the output in
            half precision.
        backend: `"auto"` for the best backend that can run, or a name of `available_backends()`. A
            named backend is used or refused, never replaced.

    Returns:
        `(B, S, H, D)` in the dtype of q; 0, with gradient 0, where no branch selects a query.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ or are not floating.
        ValueError: If shapes or devices do not fit, a number is out of range, or the backend cannot
            run the inputs.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()  # any length
        >>> pattern = DilatedPattern(segment_lengths=[16, 64], dilation_rates=[1, 4])
        >>> dilated_attention(q, k, v, pattern, is_causal=True).shape
        torch.Size([1, 100, 4, 16])
    """
    if unknown:
        check_names("dilated_attention", unknown, _ARGUMENTS)
    return dilated_attention_with_lse(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        scale=scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        head_range=head_range,
        max_workspace_bytes=max_workspace_bytes,
        backend=backend,
    ).out


# Names of all arguments, for errors about others.
_ARGUMENTS = tuple(
    name for name in inspect.signature(dilated_attention).parameters if name != "unknown"
)
