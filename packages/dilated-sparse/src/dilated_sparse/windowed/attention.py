"""Windowed dilated attention as functions: check the inputs, attend, return the merged result."""

from __future__ import annotations

from typing import get_args

import torch
from dilated_core import AttentionOutput, DilatedPattern
from dilated_core.checks import check_choice, check_head_range, check_integer
from dilated_core.inputs import check_backend_name, check_scale
from dilated_core.pattern.branches import check_pattern

from dilated_sparse.arguments import checked_dropout, checked_tensors
from dilated_sparse.windowed.ops import attend
from dilated_sparse.windowed.plan import Overlap


def windowed_dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern | None,
    window: int,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    overlap: Overlap = "once",
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Dilated attention, and a sliding window of near keys in the same softmax.

    A causal query sees its last W keys, itself among them; without causality it sees the keys less
    than W positions away on both sides. The window slides with each query, so a query right behind
    the border of a segment sees as many near keys as any other. Farther keys come from the branches
    of the pattern. Exact, forward and backward; the window costs O(S·W).

    How often a pair of query and key counts in the softmax:

    - `overlap="once"`: once, if it is in the window. Any other pair counts once for each branch
      that selects it, as in LongNet. The weights of near keys then do not depend on where segments
      begin.
    - `overlap="added"`: once for the window and once for each branch that selects it. This is
      LongNet's mixture by softmax denominators with the window as one more branch, and
      `dilated_core.merge_partials` of both attentions.

    Args:
        q: `(B, S, H, D)`: batch, sequence, heads, head_dim. Any S, any strides. With `cu_seqlens`
            `(T, H, D)`; k, v likewise.
        k, v: `(B, S, H_kv, D)`; H_kv divides H, and H/H_kv consecutive heads of q share one of k
            and v. One floating dtype and one device with q.
        pattern: The branches; None for the window alone.
        window: W, in positions, at least 1. A window of S or more is dense attention, and with
            `overlap="once"` the branches then add nothing but the zero keys of
            `padding="attended"`.
        is_causal: Query i sees only keys j ≤ i.
        scale: Factor of the scores; 1/√D if None.
        overlap: `"once"` or `"added"`, see above.
        dropout_p: Probability of dropping each attention probability; the others are divided by
            1 − `dropout_p`. Reproducible under `torch.manual_seed`.
        key_padding_mask: `(B, S)` bool, True for keys that nobody sees. The window counts their
            positions. A query left without keys gives 0.
        cu_seqlens: `(N + 1,)` int32 or int64, where each of N documents that are packed one after
            another begins, and where the last one ends. Each is a sequence of its own.
        head_range: (first, total) if q, k and v hold some of the heads, as for
            `dilated_core.dilated_attention`.
        backend: `"auto"` or a name of `dilated_core.available_backends()`. A named backend is used
            or refused, never replaced.

    Returns:
        `(B, S, H, D)` in the dtype of q.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ or are not floating.
        ValueError: If shapes or devices do not fit, a number is out of range, or the backend cannot
            run the inputs.

    Example:
        >>> q, k, v = torch.randn(3, 1, 100, 4, 16).unbind()
        >>> pattern = DilatedPattern([16, 64], [1, 4])
        >>> windowed_dilated_attention(q, k, v, pattern, 8, is_causal=True).shape
        torch.Size([1, 100, 4, 16])
    """
    return windowed_dilated_attention_with_lse(
        q,
        k,
        v,
        pattern,
        window,
        is_causal,
        scale,
        overlap=overlap,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        head_range=head_range,
        backend=backend,
    ).out


def windowed_dilated_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern | None,
    window: int,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    overlap: Overlap = "once",
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    head_range: tuple[int, int] | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """`windowed_dilated_attention` that also returns the log of the softmax denominators.

    `dilated_core.merge_partials` merges it with results over other keys. Gradients flow through out
    and lse.

    Args, errors: As for `windowed_dilated_attention`.

    Returns:
        `out` `(B, S, H, D)` in the dtype of q, and `lse` `(B, S, H)`, natural logarithm, float32
        (float64 for float64 inputs).
    """
    q, k, v = checked_tensors(q, k, v, is_causal, key_padding_mask, cu_seqlens)
    if pattern is not None:
        check_pattern(pattern)
    window = check_integer("window", window, at_least=1)
    check_choice("overlap", overlap, get_args(Overlap))
    check_backend_name(backend)
    if head_range is not None:
        head_range = check_head_range(head_range, q.shape[-2])
    dropout_p, dropout_seed = checked_dropout(dropout_p)
    if cu_seqlens is not None:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse = attend(
        q,
        k,
        v,
        pattern,
        window=window,
        overlap=overlap,
        is_causal=is_causal,
        scale=check_scale(scale, q.shape[-1]),
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        head_range=head_range,
        backend=backend,
    )
    return AttentionOutput(out, lse) if cu_seqlens is None else AttentionOutput(out[0], lse[0])
