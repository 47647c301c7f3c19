"""The exact softmax mass of blocks, and the loss that teaches it to the gate.

Shapes: B batch, S positions, H heads, K heads of k and v, G = H/K, N blocks, L positions of a
block, n rows of blocks of a strip, C blocks of each row, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from dilated_core.merge import accumulation_dtype
from torch.nn.functional import pad

from dilated_sparse.adaptive.pooling import unflatten

# Numbers of one strip of scores between positions: in float32 16 MiB.
_STRIP = 2**22


class Columns(NamedTuple):
    """The blocks of keys whose mass is measured.

    Attributes:
        indices: `(B, K, N, C)` integers, blocks of each row; negative where there is none.
        log_weights: `(B, K, N, C)`: each stands for exp of this many blocks, as random ones do for
            all they were drawn from.
    """

    indices: torch.Tensor
    log_weights: torch.Tensor


def block_mass(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    block_size: int,
    scale: float,
    is_causal: bool,
    hidden: torch.Tensor | None = None,
    columns: Columns | None = None,
) -> torch.Tensor:
    """The share of each block in the softmax of attention: exp(lse of the block − lse).

    The mean over the queries of a row of blocks, and over the heads of q that share a head of k.
    Computed in strips: O(S²/block_size) numbers are kept at most, and S × S never exist. Not
    differentiable.

    Args:
        q: `(B, S, H, D)`.
        k: `(B, S, K, D)`.
        block_size: Positions of a block.
        scale: Factor of the scores.
        is_causal: Whether query i sees only keys j ≤ i.
        hidden: `(B, S)` bool, True for keys that nobody sees, whose queries do not count; or None.
        columns: The blocks to measure. None: all N of each row.

    Returns:
        `(B, K, N, N)`, or `(B, K, N, C)` with `columns`, whose weights then stand for the blocks
        that are not measured in the lse. A row without queries or keys has 0.

    Example:
        >>> q = k = torch.zeros(1, 4, 1, 8)
        >>> block_mass(q, k, block_size=2, scale=1.0, is_causal=False)
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """
    parts = [
        mass
        for _, mass in mass_in_strips(
            q, k, block_size, scale, is_causal=is_causal, hidden=hidden, columns=columns
        )
    ]
    return torch.cat(parts, 2)


def mass_in_strips(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    scale: float,
    *,
    is_causal: bool,
    hidden: torch.Tensor | None,
    columns: Columns | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows of blocks, and the `block_mass` of these."""
    # `torch.no_grad` around a `yield` would also hold for the caller.
    wide = accumulation_dtype(q.dtype)
    B, S, H, D = q.shape
    K, L, N = k.shape[2], block_size, -(-S // block_size)
    q, k = q.detach(), k.detach()
    if hidden is not None:
        q, k = (x.masked_fill(hidden[:, :, None, None], 0) for x in (q, k))
    unseen = q.new_zeros(B, S, dtype=torch.bool) if hidden is None else hidden
    missing = N * L - S
    q, k = (pad(x.to(wide), (0, 0, 0, 0, 0, missing)) for x in (q, k))
    unseen = pad(unseen, (0, missing), value=True).view(B, N, L)
    q = q.view(B, N, L, K, H // K, D).movedim(3, 1).flatten(3, 4)  # (B, K, N, L·G, D)
    k = k.view(B, N, L, K, D).movedim(3, 1)
    number = N if columns is None else columns.indices.shape[3]
    step = max(1, _STRIP // max(1, B * H * L * number * L))
    for start in range(0, N, step):
        rows = slice(start, min(N, start + step))
        if columns is None:
            last = rows.stop if is_causal else N
            indices = torch.arange(last, device=q.device).expand(B, K, rows.stop - start, last)
            weights = None
        else:
            indices, weights = columns.indices[:, :, rows].long(), columns.log_weights[:, :, rows]
        mass = _mass(q[:, :, rows] * scale, k, unseen, indices, weights, rows, is_causal)
        yield rows, pad(mass, (0, number - mass.shape[-1]))


def _mass(
    q: torch.Tensor,
    k: torch.Tensor,
    unseen: torch.Tensor,
    indices: torch.Tensor,
    log_weights: torch.Tensor | None,
    rows: slice,
    is_causal: bool,
) -> torch.Tensor:
    """`(B, K, n, C)` of q `(B, K, n, L·G, D)`, k `(B, K, N, L, D)` and blocks `(B, K, n, C)`."""
    B, K, n, C = indices.shape
    L, device = k.shape[3], q.device
    b = torch.arange(B, device=device)[:, None, None, None]
    if log_weights is None:  # the same blocks for all rows, so none is copied
        keys = k[:, :, :C].flatten(2, 3).unsqueeze(2)
        scores = (q.flatten(2, 3) @ keys.squeeze(2).transpose(-1, -2)).view(B, K, n, -1, C, L)
    else:
        there = indices.clamp_min(0)
        keys = k[b, torch.arange(K, device=device)[:, None, None], there].flatten(3, 4)
        scores = (q @ keys.transpose(-1, -2)).view(B, K, n, -1, C, L)
    no_key = unseen[b, indices.clamp_min(0)] | (indices < 0).unsqueeze(-1)  # (B, K, n, C, L)
    no_key = no_key.unsqueeze(3)
    if is_causal:
        within = torch.arange(L, device=device)
        i = torch.arange(rows.start, rows.stop, device=device)[:, None] * L + within
        G = q.shape[3] // L
        i = i.repeat_interleave(G, 1)[:, :, None, None]  # (n, L·G, 1, 1)
        j = indices.unsqueeze(-1) * L + within
        no_key = no_key | (j.unsqueeze(3) > i)
    of_block = scores.masked_fill(no_key, -torch.inf).logsumexp(-1)
    weighted = of_block if log_weights is None else of_block + log_weights.unsqueeze(3)
    lse = weighted.logsumexp(-1, keepdim=True)
    mass = (of_block - lse.masked_fill(lse == -torch.inf, 0)).exp()
    counts = (~unseen[:, rows]).to(mass.dtype)[:, None, :, :, None]  # (B, 1, n, L, 1)
    mass = unflatten(mass, 3, (L, -1)).sum(4)
    total = counts.sum(3).clamp_min(1) * (q.shape[3] // L)
    return (mass * counts).sum(3) / total


def distillation_loss(
    scores: torch.Tensor,
    mass: torch.Tensor,
    log_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL divergence of the softmax of `scores` from the exact mass of the same blocks.

    Args:
        scores: `(…, C)`, the estimate of the log mass, up to a constant of each row.
        mass: `(…, C)`, not negative; 0 for blocks that take no part. Rows are divided by their sum.
        log_weights: `(…, C)`: each block stands for exp of this many; None: 0. With weights
            1 / (chance to be drawn), the loss over drawn blocks estimates that over all of them.

    Returns:
        The sum over the rows, and the number of rows that have any mass.
    """
    takes_part = mass > 0
    weights = torch.zeros_like(mass) if log_weights is None else log_weights.to(mass.dtype)
    total = (mass * weights.exp()).sum(-1, keepdim=True)
    log_target = (
        (mass / total.clamp_min(torch.finfo(mass.dtype).tiny)).masked_fill(~takes_part, 1).log()
    )
    weighted = (scores + weights).masked_fill(~takes_part, -torch.inf)
    has_mass = total > 0
    weighted = weighted.masked_fill(~has_mass, 0)
    log_estimate = scores - weighted.logsumexp(-1, keepdim=True)
    terms = (log_target + weights).exp() * (log_target - log_estimate)
    terms = terms.masked_fill(~(takes_part & has_mass), 0)
    return terms.sum(), has_mass.sum()


def kept_and_random(
    kept: torch.Tensor, there: torch.Tensor, num_random: int, noise: torch.Tensor
) -> Columns:
    """The kept blocks, and random ones of those that are not kept.

    Args:
        kept, there: `(B, K, N, N)` bool: blocks that are kept, and all that a row has.
        num_random: Random blocks of each row, or as many as there are.
        noise: `(B, K, N, N)`, uniform in [0, 1): of the other blocks, those with the largest.
    """
    counts = kept.sum(-1)
    others = there & ~kept
    most = int(counts.max())
    order = kept.to(torch.int8).topk(most, dim=-1)
    indices = order.indices.where(order.values > 0, -1)
    log_weights = torch.zeros_like(indices, dtype=torch.float32)
    num_random = min(num_random, kept.shape[-1])
    if num_random:
        drawn = noise.masked_fill(~others, -1).topk(num_random, dim=-1)
        indices = torch.cat([indices, drawn.indices.where(drawn.values >= 0, -1)], -1)
        number = others.sum(-1, keepdim=True).float()
        stands_for = (number / number.clamp(1, num_random)).clamp_min(1).log()
        log_weights = torch.cat([log_weights, stands_for.expand(drawn.values.shape)], -1)
    return Columns(indices, log_weights)


class _WithLoss(torch.autograd.Function):
    """The output, whose backward also differentiates a loss, with gradient 1."""

    @staticmethod
    def forward(ctx: object, out: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: object, dout: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return dout, dout.new_ones((), dtype=torch.float32)


def add_loss(out: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    """`out` itself. The backward of whatever is computed from it also differentiates `loss`."""
    return _WithLoss.apply(out, loss.float())
