"""Keep blocks within a budget: from scores to a `BlockSelection`.

Shapes: B batch, K heads of k and v, N blocks, n rows of a strip.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dilated_sparse.adaptive.scores import KeyTerms, QueryTerms, block_scores, strips
from dilated_sparse.pattern.selection import BlockSelection


class Budget(NamedTuple):
    """How many blocks a row keeps. One of the first three is given.

    Attributes:
        topk: Blocks of a row.
        mass: Sum of the estimated softmax mass of the blocks of a row.
        sparsity_ratio: Fraction of the blocks that a row has.
        local_blocks: Blocks next to the row's own, before it and, if not causal, behind it, that
            are always kept.
        sink_blocks: First blocks that are always kept.
    """

    topk: int | None
    mass: float | None
    sparsity_ratio: float | None
    local_blocks: int
    sink_blocks: int


class Rows(NamedTuple):
    """Some rows of blocks, and the blocks of keys that there are.

    Attributes:
        first: The first of the rows.
        num_blocks: N, blocks that rows choose from.
        is_causal: Row i has the blocks j ≤ i.
        has_keys: `(B, N)` bool, whether a block has a key that counts; None if all have.
    """

    first: int
    num_blocks: int
    is_causal: bool
    has_keys: torch.Tensor | None


def choose_blocks(
    queries: QueryTerms,
    keys: KeyTerms,
    budget: Budget,
    *,
    scale: float,
    is_causal: bool,
) -> BlockSelection:
    """The blocks that each row keeps; equal inputs give equal blocks.

    The row's own block, `local_blocks` and `sink_blocks` are kept first, then the blocks with the
    highest scores, and of equal scores the lower block. Scores are formed in strips of rows.

    Args:
        queries: Of N rows of blocks.
        keys: Of N blocks.
        budget: How many blocks to keep.
        scale: Factor of the scores of attention.
        is_causal: Whether row i has only the blocks j ≤ i. Its own block then takes part neither in
            the estimate nor in `mass`, since its pooled keys would hold keys of the future.
    """
    N = queries.mean.shape[2]
    has_keys = None
    if bool((keys.log_share == -torch.inf).any()):
        has_keys = (keys.log_share > -torch.inf).any(1)
    parts: list[torch.Tensor] = []
    for start, stop in strips(queries, keys):
        # In causal attention no row sees the blocks behind the last row of the strip, and that row
        # sees its own block without a score.
        last = stop if is_causal else N
        scores = block_scores(
            *(queries.rows(start, stop), keys.leading(max(1, last - int(is_causal))), scale),
            first_row=start,
            is_causal=is_causal,
        )
        scores = pad(scores, (0, last - scores.shape[-1]))
        seen = None if has_keys is None else has_keys[:, :last]
        kept = kept_blocks(scores, budget, Rows(start, last, is_causal, seen))
        parts.append(pad(kept, (0, N - last)))
    return BlockSelection.from_mask(torch.cat(parts, 2))


def kept_blocks(scores: torch.Tensor, budget: Budget, rows: Rows) -> torch.Tensor:
    """Which blocks rows keep: `(B, K, n, N)` bool, of scores `(B, K, n, N)`."""
    device, N = scores.device, rows.num_blocks
    i = torch.arange(rows.first, rows.first + scores.shape[2], device=device).unsqueeze(1)
    j = torch.arange(N, device=device)
    is_own = i == j
    there = (j < i) if rows.is_causal else torch.ones_like(is_own)
    forced = ((i - j).abs() <= budget.local_blocks) | (j < budget.sink_blocks)
    if rows.has_keys is not None:
        there = there & rows.has_keys[:, None, None]
    forced = (forced & there) | is_own
    if budget.mass is not None:
        there, forced = (x.expand(scores.shape) for x in (there, forced))
        seen = scores.masked_fill(~there, -torch.inf)
        return _within_mass(seen.masked_fill(forced, torch.inf), seen, budget.mass, forced)
    number = (there | is_own).sum(-1, keepdim=True)
    if budget.topk is not None:
        number = number.clamp_max(budget.topk)
    elif budget.sparsity_ratio is not None:
        number = (number.double() * budget.sparsity_ratio).round().long().clamp_min(1)
    number = number.maximum(forced.sum(-1, keepdim=True)).expand(*scores.shape[:-1], 1)
    ranks = scores.masked_fill(~there, -torch.inf).masked_fill_(forced, torch.inf)
    # The lowest rank that is kept does not depend on the order in which equals are sorted.
    best = ranks.topk(int(number.max()), dim=-1).values
    lowest = best.gather(-1, number - 1)
    kept = ranks >= lowest
    if bool((kept.sum(-1, keepdim=True) > number).any()):
        above, equal = ranks > lowest, ranks == lowest
        kept = above | (equal & (equal.cumsum(-1) <= number - above.sum(-1, keepdim=True)))
    # NaN, as of a step that overflowed, ranks above all, so that nothing would be kept.
    return (kept & (ranks > -torch.inf)) | forced


def _within_mass(
    ranks: torch.Tensor, scores: torch.Tensor, mass: float, forced: torch.Tensor
) -> torch.Tensor:
    """The forced blocks, and the best others until the estimated masses add up to `mass`."""
    if mass >= 1:  # where masses are rounded to 0, their sum would be reached without them
        return (ranks > -torch.inf) | forced
    order = torch.sort(ranks, dim=-1, descending=True, stable=True).indices
    shares = scores.softmax(-1).nan_to_num(0).gather(-1, order)
    before = shares.cumsum(-1) - shares
    kept = torch.zeros_like(forced).scatter(-1, order, before < mass)
    return (kept & (ranks > -torch.inf)) | forced
