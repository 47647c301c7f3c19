"""The estimate of each block's softmax mass, from sub-blocks of its queries and keys.

Shapes: B batch, S positions, H heads, K heads of k and v, G = H/K, N blocks, P sub-blocks of a
block, A = N·P sub-blocks, T terms of queries, D head_dim, d gate_dim.

A query of sub-block a gives to the keys of sub-block b about the share exp(mean Q_a · mean K_b ·
scale) of its softmax, divided by the sum of these over all b that it sees. The mass of block (i, j)
is estimated as the mean of the shares over the sub-blocks of its queries, added up over those
of its keys, and averaged over the heads of q that share a head of k. That is SubBlock (SGLang
#34148) with each query's softmax normalised: without that, queries with large scores count more
than the others. In causal attention a query block must not read its own later queries, so its
terms are the mean of the block before it, and its first query. What the gate has learned is added
to the log of the share of each sub-block of keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dilated_sparse.adaptive.gate import BlockGate, GateKeys, GateQueries, correction
from dilated_sparse.adaptive.pooling import (
    features_of_sub_blocks,
    mean_of_sub_blocks,
    unflatten,
)

# Numbers of one strip of scores: 1 MiB in float32, as much as an L2 cache. On a CPU, selecting at
# 16,384 positions takes a tenth longer with half or twice as many.
_STRIP = 2**18

# exp of more than about 88 is infinite in float32.
_LARGEST_CORRECTION = 80.0


class QueryTerms(NamedTuple):
    """What the score of a row of blocks reads of the queries.

    Attributes:
        mean: `(B, K, N, T, G, D)`.
        log_share: `(B, N, T)`, log of the share of each term's positions that count.
        gate: Of N rows, projected by the gate; None without a gate.
    """

    mean: torch.Tensor
    log_share: torch.Tensor
    gate: GateQueries | None

    def rows(self, start: int, stop: int) -> QueryTerms:
        """The terms of some rows of blocks."""
        gate = None if self.gate is None else self.gate.rows(start, stop)
        return QueryTerms(self.mean[:, :, start:stop], self.log_share[:, start:stop], gate)


class KeyTerms(NamedTuple):
    """What scores read of the keys.

    Attributes:
        mean: `(B, K, P, N, D)`: sub-blocks at one place of their block are neighbours in memory, so
            that sums over those of a block run over long rows.
        log_share: `(B, P, N)`, log of the share of each sub-block's positions that count.
        sharpness: `(K, 1, 1)`, of the gate; None without a gate.
        gate: Of the sub-blocks, projected by the gate; None without a gate.
    """

    mean: torch.Tensor
    log_share: torch.Tensor
    sharpness: torch.Tensor | None
    gate: GateKeys | None

    def leading(self, num_blocks: int) -> KeyTerms:
        """The terms of the first blocks."""
        gate = None if self.gate is None else self.gate.leading(num_blocks)
        first = (self.mean[:, :, :, :num_blocks], self.log_share[..., :num_blocks])
        return KeyTerms(*first, self.sharpness, gate)

    def join(self, other: KeyTerms) -> KeyTerms:
        """The terms of `self`, and of `other` behind them."""
        gate = None if self.gate is None or other.gate is None else self.gate.join(other.gate)
        return KeyTerms(
            torch.cat([self.mean, other.mean], 3),
            torch.cat([self.log_share, other.log_share], 2),
            self.sharpness,
            gate,
        )


class Shape(NamedTuple):
    """Sizes that scores depend on.

    Attributes:
        num_kv_heads: K.
        block_size, sub_block_size: In positions; the second divides the first.
    """

    num_kv_heads: int
    block_size: int
    sub_block_size: int

    @property
    def per_block(self) -> int:
        """P."""
        return self.block_size // self.sub_block_size


def key_terms(
    k: torch.Tensor,
    unrotated: torch.Tensor,
    shape: Shape,
    hidden: torch.Tensor | None,
    gate: BlockGate | None,
) -> KeyTerms:
    """The terms of keys `(B, S, K, D)`, of N = ⌈S / block_size⌉ blocks."""
    is_rotated = unrotated is not k
    k, unrotated, hidden = _in_whole_blocks(k, unrotated, shape, hidden)
    size, K, P = shape.sub_block_size, shape.num_kv_heads, shape.per_block
    mean, log_share = mean_of_sub_blocks(k, size, K, hidden)
    mean = mean.squeeze(3)
    by_place = unflatten(mean, 2, (-1, P)).transpose(2, 3).contiguous()
    shares = unflatten(log_share, 1, (-1, P)).transpose(1, 2)
    if gate is None:
        return KeyTerms(by_place, shares, None, None)
    pooled = features_of_sub_blocks(unrotated, size, K, hidden, None if is_rotated else mean)
    sharpness = gate.sharpness.view(-1, 1, 1)
    return KeyTerms(by_place, shares, sharpness, gate.project_keys(pooled, P))


def query_terms(
    q: torch.Tensor,
    unrotated: torch.Tensor,
    shape: Shape,
    hidden: torch.Tensor | None,
    gate: BlockGate | None,
    *,
    reads_own_block: bool,
) -> QueryTerms:
    """The terms of queries `(B, S, H, D)`, for each of ⌈S / block_size⌉ rows of blocks.

    Args:
        q: Queries as attention uses them.
        unrotated: Queries before they are rotated by their positions, for the gate.
        shape: Sizes.
        hidden: `(B, S)` bool, True for positions that do not count; or None.
        gate: The gate or None.
        reads_own_block: The terms are the P sub-blocks of the block itself. Else they are the block
            before it as one, and its own first query, which counts as much.
    """
    is_rotated = unrotated is not q
    q, unrotated, hidden = _in_whole_blocks(q, unrotated, shape, hidden)
    K, size = shape.num_kv_heads, shape.sub_block_size
    if not reads_own_block:
        # The queries of the block before only stand for those of the own one: a trained gate
        # recalls the same to 0.1 % with one mean of them as with one for each sub-block.
        size = shape.block_size
    first = slice(None, None, shape.block_size)
    first_hidden = None if hidden is None else hidden[:, first]
    mean, log_share = mean_of_sub_blocks(q, size, K, hidden)
    P = shape.block_size // size
    mean, log_share = unflatten(mean, 2, (-1, P)), unflatten(log_share, 1, (-1, P))
    known = None if is_rotated or hidden is not None else mean.mean((3, 4))
    if not reads_own_block:
        one, one_share = mean_of_sub_blocks(q[:, first], 1, K, first_hidden)
        mean = torch.cat([_from_block_before(mean, 2), one.unsqueeze(3)], 3)
        before = _from_block_before(log_share, 1, fill=-math.inf)
        log_share = torch.cat([before, one_share.unsqueeze(2)], 2)
    if gate is None:
        return QueryTerms(mean, log_share, None)
    pooled = features_of_sub_blocks(unrotated, shape.block_size, K, hidden, known)
    if not reads_own_block:
        pooled = _from_block_before(pooled, 2)
    one = mean_of_sub_blocks(unrotated[:, first], 1, K, first_hidden)[0].mean(3)
    return QueryTerms(mean, log_share, gate.project_queries(pooled, one))


def block_scores(
    queries: QueryTerms,
    keys: KeyTerms,
    scale: float,
    *,
    first_row: int,
    is_causal: bool,
) -> torch.Tensor:
    """The estimated log mass `(B, K, rows, blocks)`, up to a constant of each row.

    Masses far below the largest of their row, by a factor of about exp(87), all count as one low
    value, as do those of a block without any key, and of all blocks of a row without any term.

    Args:
        queries: Of the rows.
        keys: Of the blocks.
        scale: Factor of the scores of attention.
        first_row: The first of the rows.
        is_causal: Whether row i sees the blocks j < i alone. Its other entries have no meaning.
    """
    shares = _shares(queries, keys, scale, first_row if is_causal else None)
    if queries.gate is not None and keys.gate is not None:
        learned = correction(queries.gate, keys.gate, first_row).to(shares.dtype)
        shares = learned.clamp_max_(_LARGEST_CORRECTION).exp_().mul(shares)
    scores = shares.sum(3).clamp_min(torch.finfo(shares.dtype).tiny).log()
    if keys.sharpness is not None:
        scores = scores * (1 + keys.sharpness.to(scores.dtype))
    return scores


@torch.no_grad()
def _shares(
    queries: QueryTerms, keys: KeyTerms, scale: float, first_row: int | None
) -> torch.Tensor:
    """The share of each sub-block of keys, a sum over the terms: `(B, K, n, P, N)`.

    Args:
        first_row: None: rows see all blocks.
        queries, keys, scale: As for `block_scores`.
    """
    B, K, n, T, G, D = queries.mean.shape
    P, N = keys.mean.shape[2:4]
    rows = queries.mean.reshape(B, K, n * T * G, D) * scale
    scores = rows @ keys.mean.reshape(B, K, P * N, D).transpose(-1, -2)
    by_block = scores.view(B, K, n, T * G, P, N)
    lowest = torch.finfo(scores.dtype).min  # a row of −∞ would have a softmax of NaN
    if bool((keys.log_share != 0).any()):
        by_block.add_(keys.log_share[:, None, None, None]).clamp_min_(lowest)
    if first_row is not None:
        # Only the last columns have blocks that some row does not see.
        late = by_block[..., first_row:]
        i = torch.arange(n, device=scores.device).unsqueeze(1)
        is_future = torch.arange(late.shape[-1], device=scores.device) >= i
        late.masked_fill_(is_future[:, None, None], lowest)
    shares = by_block.flatten(-2).softmax(-1)
    weights = queries.log_share.exp()[:, None, :, None, :, None].expand(B, K, n, 1, T, G)
    return (weights.flatten(-2) @ shares).view(B, K, n, P, N)


def strips(queries: QueryTerms, keys: KeyTerms) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows of blocks of each strip, so that its scores are few."""
    B, K, N, T, G, _ = queries.mean.shape
    at_most = max(1, _STRIP // max(1, B * K * T * G * keys.log_share[0].numel()))
    step = -(-N // -(-N // at_most))  # equal strips
    for start in range(0, N, step):
        yield start, min(N, start + step)


def _from_block_before(x: torch.Tensor, dim: int, fill: float = 0.0) -> torch.Tensor:
    """Block i gets what block i − 1 has; block 0 gets `fill`."""
    first = torch.full_like(x.narrow(dim, 0, 1), fill)
    return torch.cat([first, x.narrow(dim, 0, x.shape[dim] - 1)], dim)


def _in_whole_blocks(
    x: torch.Tensor, unrotated: torch.Tensor, shape: Shape, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The tensors with positions that do not count behind them, up to a whole block."""
    missing = -x.shape[1] % shape.block_size
    if not missing:
        return x, unrotated, hidden
    hidden = (
        torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if hidden is None else hidden
    )
    rows = (0, 0, 0, 0, 0, missing)
    return pad(x, rows), pad(unrotated, rows), pad(hidden, (0, missing), value=True)
