"""Which earlier blocks each query chooses: the rules of MoBA and of NSA, without gradients.

Shapes: B batch, S positions, G groups of heads that choose together, N blocks, n chosen blocks.

A choice is `(B, S, G, n)` int64: the numbers of n blocks before the query's own, ascending, −1
where there are fewer. The own block is not listed, since every query sees it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from dilated_core.merge import accumulation_dtype
from torch.nn.functional import conv1d, pad

from dilated_sparse.execution.run import split

# Scores of one strip of queries. The scores of all queries would be S·N numbers a head.
_STRIP_NUMBERS = 2**22


def top_blocks(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` highest of the scores `(…, N)`: their numbers, ascending, −1 for missing ones.

    Of equal scores the lower number is chosen. Scores of −∞ are never chosen.
    """
    chosen = scores.new_full((*scores.shape[:-1], count), -1, dtype=torch.int64)
    number = min(count, scores.shape[-1])
    if number == 0:
        return chosen
    # The lowest value that is chosen does not depend on the order in which equals are sorted.
    lowest = scores.topk(number, dim=-1).values[..., -1:]
    above = scores > lowest
    equal = (scores == lowest) & (scores > -torch.inf)
    kept = above | (equal & (equal.cumsum(-1) <= number - above.sum(-1, keepdim=True)))
    kept = kept.flatten(0, -2)
    rows, blocks = kept.nonzero(as_tuple=True)
    places = (kept.cumsum(-1) - 1)[rows, blocks]
    chosen.view(-1, count)[rows, places] = blocks
    return chosen


def moba_choice(q: torch.Tensor, k: torch.Tensor, block_size: int, count: int) -> torch.Tensor:
    """Per query and head, the earlier blocks with the highest q · mean(k) (arXiv 2502.13189).

    Args:
        q: `(B, S, H, D)`.
        k: `(B, S, K, D)`; K divides H.
        block_size: Positions of a block.
        count: n.

    Returns:
        The choice, with G = H.
    """
    B, S, H, _ = q.shape
    N, K = S // block_size, k.shape[2]
    wide = accumulation_dtype(q.dtype)
    blocks = split(k[:, : N * block_size], 1, (N, block_size))
    means = blocks.to(wide).mean(2)
    choice = q.new_empty((B, S, H, count), dtype=torch.int64)
    positions = torch.arange(S, device=q.device)
    for strip in _strips(S, B * H * max(N, 1)):
        rows = split(q[:, strip].to(wide), 2, (K, H // K))
        scores = torch.einsum("bskgd,bnkd->bskgn", rows, means).flatten(2, 3)
        own = positions[strip] // block_size
        choice[:, strip] = top_blocks(_earlier_only(scores, own), count)
    return choice


def nsa_choice(
    q: torch.Tensor,
    k: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_size: int,
    stride: int,
    scale: float,
    selection_block_size: int,
    count: int,
    num_initial_blocks: int,
    num_local_blocks: int,
) -> torch.Tensor:
    """Per query and head of k, the blocks with most attention in the compressed branch.

    Eq. 8 to 11 of arXiv 2502.11089: a block's score is the sum of the probabilities of the
    compressed keys, each as often as strides of the block lie in it, over the heads of q that share
    a head of k.

    Args:
        q: `(B, S, H, D)`.
        k: Compressed keys `(B, C, K, D)`. Key i stands for the positions from `i · stride` on, l of
            them, and a query sees it if none of these lies behind the query.
        lse: `(B, S, H)`, of the attention of q to k.
        block_size: l, positions of a compressed key.
        stride: d, positions between compressed keys; divides l and l'.
        scale: Factor of the scores.
        selection_block_size: l', positions of a block.
        count: n; blocks chosen beside the query's own.
        num_initial_blocks: First blocks that are always chosen.
        num_local_blocks: Blocks up to the query's own, and with it, that are always chosen.

    Returns:
        The choice, with G = K.
    """
    B, S, H, _ = q.shape
    C, K = k.shape[1:3]
    N = -(-S // selection_block_size)
    wide = accumulation_dtype(q.dtype)
    choice = q.new_empty((B, S, K, count), dtype=torch.int64)
    positions = torch.arange(S, device=q.device)
    blocks = torch.arange(N, device=q.device)
    ends = torch.arange(C, device=q.device) * stride + block_size - 1
    weights = _Weights(block_size // stride, selection_block_size // stride)
    for strip in _strips(S, B * H * max(C, N)):
        rows = split(q[:, strip].to(wide), 2, (K, H // K))
        scores = torch.einsum("bskgd,bckd->bskgc", rows, k.to(wide)) * scale
        here = positions[strip]
        is_hidden = (ends > here[:, None])[:, None, None]
        scores = scores.masked_fill(is_hidden, -torch.inf)
        # A query that sees no key has lse −∞.
        row_lse = split(lse[:, strip], 2, (K, H // K)).unsqueeze(-1)
        shares = (scores - row_lse.clamp_min(torch.finfo(wide).min)).exp().sum(3)
        own = here // selection_block_size
        totals = _earlier_only(_shares_of_blocks(shares, weights, N), own)
        distance = own[:, None] - blocks
        forced = (blocks < num_initial_blocks) | (distance < num_local_blocks)
        forced = (forced & (distance > 0))[:, None]
        choice[:, strip] = top_blocks(totals.masked_fill(forced, torch.inf), count)
    return choice


class _Weights(NamedTuple):
    """Sizes in strides, of which a block and a compressed key may have several in common.

    Attributes:
        compressed: Strides of a compressed key.
        selection: Strides of a block.
    """

    compressed: int
    selection: int

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Entry i: the strides that a block shares with compressed key `first + i`.

        The first one begins `compressed − 1` strides before the block.
        """
        a, b = self
        return x.new_tensor([min(i + 1, a, b, a + b - 1 - i) for i in range(a + b - 1)])


def _shares_of_blocks(shares: torch.Tensor, weights: _Weights, num_blocks: int) -> torch.Tensor:
    """Attention `(B, s, K, N)` to blocks, from that `(B, s, K, C)` to compressed keys."""
    kernel = weights.like(shares)
    before = weights.compressed - 1
    length = (num_blocks - 1) * weights.selection + kernel.shape[0]
    padded = pad(shares, (before, length - before - shares.shape[-1]))
    rows = padded.flatten(0, 2).unsqueeze(1)
    sums = conv1d(rows, kernel.view(1, 1, -1), stride=weights.selection)
    return sums.view(*shares.shape[:-1], num_blocks)


def _strips(seq_len: int, numbers_per_position: int) -> list[slice]:
    step = max(1, _STRIP_NUMBERS // max(1, numbers_per_position))
    return [slice(i, min(i + step, seq_len)) for i in range(0, seq_len, step)]


def _earlier_only(scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Scores `(B, s, G, N)` with −∞ for the blocks from the own one `(s,)` on."""
    blocks = torch.arange(scores.shape[-1], device=scores.device)
    return scores.masked_fill((blocks >= own[:, None])[:, None], -torch.inf)
