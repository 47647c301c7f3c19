"""Stochastic depth: a residual branch is dropped for a whole sequence (arXiv 1603.09382)."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_path(x: Tensor, p: float, cu_seqlens: Tensor | None = None) -> Tensor:
    """Zero `x` for each sequence with probability p, and divide the others by 1 − p.

    Args:
        x: `(B, S, E)`; `(T, E)` with `cu_seqlens`.
        p: Probability of dropping a sequence, in [0, 1).
        cu_seqlens: Where the sequences begin that are packed in `x`.

    Example:
        >>> x = drop_path(torch.ones(8, 2, 3), 0.5)
        >>> set(x.flatten().tolist()) <= {0.0, 2.0}
        True
    """
    count = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
    # A compiler takes p as a number of its graph: `bernoulli_` would need a graph for each p, and
    # each block has its own.
    kept = (torch.rand(count, device=x.device) >= p).to(x.dtype) / (1 - p)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().to(x.device)
        return x * kept.repeat_interleave(lengths, output_size=len(x))[:, None]
    return x * kept.view(-1, *(1,) * (x.dim() - 1))
