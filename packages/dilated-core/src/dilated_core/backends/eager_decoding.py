"""Decoding with plain PyTorch: append tokens to a cache, and attend from the newest one.

B batch, H heads, H_kv heads of k and v, D head_dim, w segment length, r dilation rate.
"""

from __future__ import annotations

import torch

from dilated_core.backends.cache_layout import CacheLayout
from dilated_core.merge import AttentionOutput, fold_lse_, lse_dtype
from dilated_core.pattern.branches import kept_rows


def append_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: CacheLayout,
    position: int,
) -> None:
    """Store what the segments of the last of the tokens keep of them.

    Args:
        k, v: `(B, n, H_kv, D)`, n at least 1.
        keys, values: `(B, rows, D)`, the cache.
        layout: Of the cache.
        position: Of the first of the tokens.
    """
    start, stop = position, position + k.shape[1]
    for (w, r), branch in zip(layout.branches, layout.sections, strict=True):
        segment = (stop - 1) // w * w
        oldest = max(start, segment)
        for section in branch:
            row = kept_rows(oldest - segment, r, section.offset)  # the first one not yet stored
            first = segment + section.offset + row * r
            if first >= stop:
                continue
            last_row = row + kept_rows(stop - first, r, 0)
            for cached, new in ((keys, k), (values, v)):
                kept = new[:, first - start : stop - start : r].index_select(2, section.kv_heads)
                section.view(cached)[:, :, row:last_row] = kept.transpose(1, 2)


def attend_newest(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: CacheLayout,
    *,
    position: int,
    scale: float,
) -> AttentionOutput:
    """Attention of the token at `position`, which is in the cache already.

    Args:
        q: `(B, 1, H, D)`.
        keys, values: `(B, rows, D)`, the cache.
        layout: Of the cache.
        position: Of the token.
        scale: Factor of the scores.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BHD = q[:, 0].to(dtype)
    out = torch.zeros_like(q_BHD)
    lse = q_BHD.new_full(q_BHD.shape[:2], -torch.inf, dtype=lse_dtype(q.device))
    for (w, r), branch in zip(layout.branches, layout.sections, strict=True):
        row, offset = divmod(position % w, r)
        for section in branch:
            if section.offset != offset:
                continue
            # (B, heads of k and v, rows, D), and heads of q in the place of rows.
            section_keys, section_values = (
                section.view(cached)[:, :, : row + 1].to(dtype) for cached in (keys, values)
            )
            queries = q_BHD.index_select(1, section.q_heads)
            p = (queries.view(len(q), *section.shape, q.shape[3]) @ section_keys.mT).mul_(scale)
            largest = p.amax(-1, keepdim=True)
            total = p.sub_(largest).exp_().sum(-1, keepdim=True)
            # Divided by its sum: exp(score − lse) would carry the rounding of a large lse.
            new_out = (p @ section_values).div_(total).flatten(1, 2)
            new_lse = largest.to(lse.dtype) + total.to(lse.dtype).log()
            # A head may see other branches: fold this one into what they gave.
            section_lse = lse.index_select(1, section.q_heads)
            weight = fold_lse_(section_lse, new_lse.flatten(1)).to(dtype)
            section_out = out.index_select(1, section.q_heads)
            lse.index_copy_(1, section.q_heads, section_lse)
            out.index_copy_(1, section.q_heads, section_out.lerp(new_out, weight[..., None]))
    return AttentionOutput(out.to(q.dtype)[:, None], lse.to(dtype)[:, None])
