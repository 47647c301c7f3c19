"""Dense attention in float64 under the mask of a block pattern: the oracle."""

import torch
from dilated_sparse import BlockPattern


def position_mask(
    pattern: BlockPattern, S: int, block_size: int, num_heads: int, *, is_causal: bool
) -> torch.Tensor:
    """Which keys each query sees: `(H, S, S)` bool."""
    mask = pattern.materialize(num_heads=num_heads)
    mask = mask.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[:, :S, :S]
    return mask.tril() if is_causal else mask


def masked_rows(
    pattern: BlockPattern, mask: torch.Tensor, block_size: int, num_heads: int, *, is_causal: bool
) -> torch.Tensor:
    """Which keys each query sees beside a mask of keys `(B, S)`: `(B, H, S, S)` bool.

    The blocks of a batch row are counted from its first visible key.
    """
    B, S = mask.shape
    visible = torch.zeros(B, num_heads, S, S, dtype=torch.bool)
    for row, hidden in zip(visible, mask, strict=True):
        if not hidden.all():
            first = int((~hidden).nonzero()[0])
            length = S - first
            own = pattern.leading(-(-length // block_size))
            seen = position_mask(own, length, block_size, num_heads, is_causal=is_causal)
            row[:, first:, first:] = seen & ~hidden[first:]
    return visible


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float | None = None,
    factors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse in float64, differentiable, for mask `(H, S, S)` or `(B, H, S, S)`.

    `factors`: Of the probabilities, `(B, H, S, S)`: those of dropout.
    """
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bshd,bthd->bhst", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    scores = scores.masked_fill(~mask, -torch.inf)
    sees = mask.any(-1, keepdim=True)
    p = scores.masked_fill(~sees, 0).softmax(-1).masked_fill(~sees, 0)
    p = p if factors is None else p * factors
    lse = scores.logsumexp(-1).transpose(1, 2)
    return torch.einsum("bhst,bthd->bshd", p, v), lse
