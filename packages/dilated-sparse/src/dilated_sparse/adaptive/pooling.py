"""Sums of positions: means, and what the gate reads, of each sub-block.

Shapes: B batch, S positions, H heads, K heads of k and v, G = H/K heads of q that share one, A
sub-blocks, D head_dim.
"""

from __future__ import annotations

import torch
from dilated_core.merge import accumulation_dtype
from torch.nn.functional import pad


def mean_of_sub_blocks(
    x: torch.Tensor, size: int, num_kv_heads: int, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means `(B, K, A, G, D)`, and the log of the share of positions that count, `(B, A)`.

    Args:
        x: `(B, S, H, D)`; the last sub-block may be short.
        size: Positions of a sub-block.
        num_kv_heads: K.
        hidden: `(B, S)` bool, True for positions that do not count; or None. A sub-block without
            a position has mean 0 and share 0, whose log is −inf.
    """
    x, counts = _in_sub_blocks(x, size, num_kv_heads, hidden, fill=0.0)
    means = x.sum(2) / counts.clamp_min(1)[:, :, None, None, None]
    return means.movedim(2, 1), (counts / size).log()


def features_of_sub_blocks(
    x: torch.Tensor,
    size: int,
    num_kv_heads: int,
    hidden: torch.Tensor | None,
    means: torch.Tensor | None = None,
) -> torch.Tensor:
    """`(B, K, A, 3·D)`: mean, maximum and minimum over the positions and the G heads.

    A sub-block without a position has 0.

    Args:
        x, size, num_kv_heads, hidden: As for `mean_of_sub_blocks`.
        means: `mean_of_sub_blocks` of the same, averaged over the G heads, where it is known.
    """
    dims = (2, 4)
    low, counts = _in_sub_blocks(x, size, num_kv_heads, hidden, fill=-torch.inf)
    high = _in_sub_blocks(x, size, num_kv_heads, hidden, fill=torch.inf)[0]
    if means is None:
        means = mean_of_sub_blocks(x, size, num_kv_heads, hidden)[0].mean(3)
    extremes = (y.transpose(1, 2) for y in (low.amax(dims), high.amin(dims)))
    pooled = torch.cat([means, *extremes], -1)
    return pooled if hidden is None else pooled.masked_fill((counts == 0)[:, None, :, None], 0)


def _in_sub_blocks(
    x: torch.Tensor, size: int, num_kv_heads: int, hidden: torch.Tensor | None, *, fill: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, A, size, K, G, D)` with `fill` where nothing counts, and how many count `(B, A)`."""
    B, S, H, D = x.shape
    wide = accumulation_dtype(x.dtype)
    x = x.detach().to(wide)
    if hidden is not None:
        x = x.masked_fill(hidden[:, :, None, None], fill)
    visible = x.new_ones(B, S) if hidden is None else (~hidden).to(wide)
    if missing := -S % size:
        x = pad(x, (0, 0, 0, 0, 0, missing), value=fill)
        visible = pad(visible, (0, missing))
    counts = visible.view(B, -1, size).sum(2)
    return x.reshape(B, -1, size, num_kv_heads, H // num_kv_heads, D), counts


def unflatten(x: torch.Tensor, dim: int, sizes: tuple[int, int]) -> torch.Tensor:
    """`Tensor.unflatten`, whose type PyTorch leaves open."""
    return x.unflatten(dim, sizes)  # pyright: ignore
