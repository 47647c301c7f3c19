"""Dilated attention as functions: check the inputs, attend, return the merged result."""

from __future__ import annotations

import torch

from dilated_core import ops
from dilated_core.inputs import check_dropout, check_inputs, check_scale
from dilated_core.output import AttentionOutput
from dilated_core.pattern import DilatedPattern


def dilated_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> AttentionOutput:
    """`dilated_attention` that also returns the log of the softmax denominators.

    The lse is what partial results over different keys are merged by (`merge_partials`); gradients
    flow through both results.

    Args, errors: As for `dilated_attention`.

    Returns:
        `out` `(B, S, H, D)` in the dtype of q, and `lse` `(B, S, H)`, natural logarithm, float32
        (float64 for float64 inputs).
    """
    check_inputs(q, k, v, pattern)
    dropout_p = check_dropout(dropout_p)
    group = q.shape[2] // k.shape[2] if k.shape[2] else 1
    if group > 1:
        k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    # Drawn here, so that torch.manual_seed decides, a compiled graph draws anew at each call, and
    # recomputation under activation checkpointing draws the same again.
    dropout_seed = torch.randint(2**62, (), device="cpu") if dropout_p else None
    out, lse = ops.attention_forward(
        q,
        k,
        v,
        pattern.segment_lengths,
        pattern.dilation_rates,
        pattern.head_offsets,
        pattern.padding,
        bool(is_causal),
        check_scale(scale, q.shape[-1]),
        backend,
        dropout_p,
        dropout_seed,
    )
    return AttentionOutput(out, lse)


def dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of each query over the keys that the pattern's branches select for it.

    One softmax per query over the multiset union of the keys of its branches, which is the paper's
    mixing of branches by their softmax denominators (arXiv 2307.02486, eq. 9–10), exactly, forward
    and backward. Compute and memory are linear in S for fixed segments.

    Args:
        q: `(B, S, H, D)`: batch, sequence, heads, head_dim. Any S, any strides.
        k, v: `(B, S, H_kv, D)`; H_kv divides H, and H/H_kv consecutive heads of q share one of k
            and v (grouped-query attention). One floating dtype and one device with q.
        pattern: Segment lengths, dilation rates, head offsets and padding.
        is_causal: Query i sees only keys j ≤ i.
        scale: Factor of the scores; 1/√D if None.
        dropout_p: Probability of dropping each attention probability; the others are divided by
            1 − `dropout_p`. Pass 0 when not training. Reproducible under `torch.manual_seed`.
        backend: `"auto"` for the best that can run, or a name of `available_backends()`, which is
            then used or refused, never replaced.

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
    return dilated_attention_with_lse(
        q, k, v, pattern, is_causal=is_causal, scale=scale, dropout_p=dropout_p, backend=backend
    ).out
