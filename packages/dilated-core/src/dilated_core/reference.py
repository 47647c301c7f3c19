"""The oracle: dilated attention from its definition, dense and in float64.

The oracle reads the fields of the pattern, and none of the positions that other modules compute
from them. So a mistake in those modules cannot be on both sides of a test. Quadratic in S; only
tests use it.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from dilated_core.checks import check_bool, check_number
from dilated_core.merge import AttentionOutput
from dilated_core.pattern.branches import DilatedPattern


def reference_dilated_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> AttentionOutput:
    """One softmax per query over the multiset union of the keys its branches select, with its lse.

    The paper mixes the branches by their softmax denominators (arXiv 2307.02486, eq. 9–10), which
    is this softmax exactly; a key that two branches select counts twice.

    Args:
        q: `(B, S, H, D)`, any floating dtype.
        k, v: `(B, S, H_kv, D)`; H_kv divides H.
        pattern: The branches.
        is_causal: Query i sees only the keys j ≤ i.
        scale: Factor of the scores; 1/√D if None.
        key_padding_mask: `(B, S)` bool, True for keys that nobody sees. Their rows of k and v may
            hold anything, NaN too, and have gradient 0.
        cu_seqlens: `(N + 1,)`, where each of N documents begins and the last one ends; then q, k
            and v are `(T, H, D)`, and each document is a sequence of its own.

    Returns:
        `out` of the shape of q and `lse` of that shape without D, both float64, differentiable.
    """
    if cu_seqlens is not None:
        bounds = [int(bound) for bound in cu_seqlens]
        documents = [
            reference_dilated_attention_with_lse(
                q[None, a:b], k[None, a:b], v[None, a:b], pattern, is_causal=is_causal, scale=scale
            )
            for a, b in pairwise(bounds)
        ]
        return AttentionOutput(
            torch.cat([document.out[0] for document in documents]),
            torch.cat([document.lse[0] for document in documents]),
        )
    check_bool("is_causal", is_causal)
    B, S, H, D = q.shape
    if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask has dtype {key_padding_mask.dtype}; it must be bool, True for keys "
            f"to ignore."
        )
    q, k, v = q.double(), k.double(), v.double()
    if key_padding_mask is not None:
        # A probability of 0 does not hide a NaN: 0 · NaN is NaN.
        k, v = (x.masked_fill(key_padding_mask[:, :, None, None], 0) for x in (k, v))
    scale = 1 / math.sqrt(D) if scale is None else check_number("scale", scale)
    # Grouped queries: consecutive heads of q share a head of k and v.
    kv_head = torch.arange(H, device=q.device) // max(1, H // max(1, k.shape[2]))
    k, v = k[:, :, kv_head], v[:, :, kv_head]
    counts_HSS, zero_keys = _counts(pattern, S, H, q.device, is_causal)
    counts = counts_HSS.expand(B, -1, -1, -1)
    if key_padding_mask is not None:
        counts = counts * ~key_padding_mask[:, None, None, :]

    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    # A key seen c times adds c·exp(score) = exp(score + log c); log 0 = −inf leaves it out. Zero
    # keys have score 0 and value 0: m of them add exp(log m) to the denominator and nothing else.
    logits = torch.cat(
        [scores + counts.log(), zero_keys.log()[None, :, :, None].expand(B, -1, -1, -1)],
        dim=-1,
    )
    # Rows without any key get a finite dummy logit, so that neither they nor their gradients
    # become NaN; what it contributes is multiplied by an exact 0.
    empty = (counts.sum(-1) + zero_keys == 0)[..., None]
    dummy = torch.zeros_like(logits[..., :1]).masked_fill(~empty, -math.inf)
    p = torch.cat([logits, dummy], dim=-1).softmax(-1)
    out = torch.einsum("bhij,bjhd->bihd", p[..., :S], v)
    lse = torch.logsumexp(torch.cat([logits, dummy], dim=-1), dim=-1)
    lse = lse.masked_fill(empty[..., 0], -math.inf)
    return AttentionOutput(out, lse.transpose(1, 2))


def reference_dilated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> torch.Tensor:
    """The `out` of `reference_dilated_attention_with_lse`: `(B, S, H, D)`, float64.

    Example:
        >>> q = k = v = torch.ones(1, 3, 2, 4)
        >>> out = reference_dilated_attention(q, k, v, DilatedPattern([2], [2]))
        >>> out[0, :, :, 0]  # head 1 keeps position 1 alone; nothing selects (0, 1) and (1, 0)
        tensor([[1., 0.],
                [0., 1.],
                [1., 0.]], dtype=torch.float64)
    """
    return reference_dilated_attention_with_lse(
        q,
        k,
        v,
        pattern,
        is_causal=is_causal,
        scale=scale,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
    ).out


def _counts(
    pattern: DilatedPattern, S: int, H: int, device: torch.device, is_causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """How often query i of head h sees key j, `(H, S, S)`, and how many zero keys, `(H, S)`."""
    counts = torch.zeros(H, S, S, dtype=torch.float64, device=device)
    zero_keys = torch.zeros(H, S, dtype=torch.float64, device=device)
    position = torch.arange(S, device=device)
    for w, r in zip(pattern.segment_lengths, pattern.dilation_rates, strict=True):
        w = min(w, S)
        segment, index = position // w, position % w
        for h in range(H):
            offset = h % r if pattern.head_offsets == "interleaved" else h // -(-H // r)
            # A rate beyond w keeps what w as the rate keeps, and may exceed 64 bits.
            kept = index % min(r, max(w, 1)) == offset
            sees = kept[:, None] & kept[None, :] & (segment[:, None] == segment[None, :])
            counts[h] += sees
            if pattern.padding == "attended" and not is_causal:
                # The segment is filled with zero keys up to w rounded up to a multiple of r, of
                # which each head keeps one in r.
                zero_keys[h] += kept * (-(-w // r) - sees.sum(-1))
    if is_causal:
        counts *= position[:, None] >= position[None, :]
    return counts, zero_keys
