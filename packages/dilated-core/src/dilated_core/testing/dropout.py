"""Dense attention with dropout by position, one number at a time: what fast code must equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dilated_core.pattern.branches import DilatedPattern

_LOW = 2**32 - 1


def attention_with_dropout(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool,
    dropout_p: float,
    seed: int | None = None,
    first: int = 0,
) -> torch.Tensor:
    """Dilated attention of `(B, S, H, D)`, differentiable; for small inputs.

    Draws the seed as `dilated_attention` does, unless one is given. `first` is the number of the
    first position.
    """
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    S, H, D = q.shape[1:]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * D**-0.5
    branches = list(zip(pattern.segment_lengths, pattern.dilation_rates, strict=True))
    counts: list[torch.Tensor] = []
    zero_keys = torch.zeros(H, S, dtype=q.dtype)
    for w, r in branches:
        branch = DilatedPattern([w], [r], head_offsets=pattern.head_offsets)
        counts.append(branch.materialize(S, H, is_causal=is_causal).to(q.dtype))
        if pattern.padding == "attended" and not is_causal:
            zero_keys += _zero_keys(min(w, S), r, counts[-1], S)
    weights = scores.exp()
    total = sum((count * weights).sum(-1) for count in counts) + zero_keys
    total = torch.where(total == 0, 1.0, total)
    kept = torch.zeros_like(scores)
    for number, count in enumerate(counts):
        mask = kept_pairs(seed, q.shape, first=first, branch=number, dropout_p=dropout_p)
        kept = kept + count * mask.to(q.dtype)
    p = kept * weights / total.unsqueeze(-1) / (1 - dropout_p)
    return torch.einsum("bhij,bjhd->bihd", p, v)


def _zero_keys(w: int, r: int, count: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Zero keys of each query: what its segment has fewer keys than a whole one, `(H, S)`."""
    sees = count.sum(-1)
    full = -(-w // r)
    return torch.where(sees > 0, full - sees, 0.0)


def kept_pairs(
    seed: int, shape: Sequence[int], *, dropout_p: float, first: int = 0, branch: int = 0
) -> torch.Tensor:
    """Which pairs of queries and keys are kept: `(B, H, S, S)` for tensors `(B, S, H, …)`."""
    B, S, H = shape[:3]
    queries, keys, heads = (_base(seed + i) for i in (1, 2, 3))
    kept = torch.empty(B, H, S, S, dtype=torch.bool)
    for b in range(B):
        q, k = (
            torch.tensor([_hash(_hash(base + b) + first + i) - 2**31 for i in range(S)])
            for base in (queries, keys)
        )
        for h in range(H):
            extra = _hash(_hash(heads) + h) - 2**31 + _hash(branch)
            x = _hash_bits((q[:, None] + k + extra) & _LOW)
            # 0 stands for the smallest int32.
            kept[b, h] = ((x + 2**31) & _LOW) >= dropout_p * 2**32
    return kept


def _base(seed: int) -> int:
    return _hash(_hash(seed & _LOW) + (seed >> 32))


def _hash(x: int) -> int:
    x = int(_hash_bits(torch.tensor(x & _LOW)))
    return x ^ (x >> 16)


def _hash_bits(x: torch.Tensor) -> torch.Tensor:
    """Numbers from 0 to 2³² − 1, mixed; int64."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & _LOW
    return (x ^ (x >> 15)) * 0x846CA68B & _LOW
