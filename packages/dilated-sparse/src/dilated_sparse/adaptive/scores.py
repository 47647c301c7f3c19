"""The estimate of each block's softmax mass, from sub-blocks of its queries and keys.

Shapes: B batch, S positions, H heads, K heads of k and v, G = H/K, N blocks, P sub-blocks of a
block, A = N·P sub-blocks, T terms of queries, D head_dim, d gate_dim.

The mass of block (i, j) is estimated as the log of Σ exp(mean Q_a · mean K_b · scale) over the
sub-blocks a of its queries and b of its keys (SubBlock, SGLang #34148), and over the heads of q
that share a head of k. In causal attention a query block must not read its own later queries, so
its terms are the sub-blocks of the block before it, and its first query.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from dilated_sparse.adaptive.gate import BlockGate, Projected, correction
from dilated_sparse.adaptive.pooling import (
    features_of_sub_blocks,
    mean_of_sub_blocks,
    unflatten,
)

# Numbers of one strip of scores: in float32 1 MiB, which stay in a processor's cache.
_STRIP = 2**18


class QueryTerms(NamedTuple):
    """What the score of a row of blocks reads of the queries.

    Attributes:
        mean: `(B, K, N, T, G, D)`.
        log_share: `(B, N, T)`, log of the share of each term's positions that count.
        gate: Two of `(B, K, N, T, d)`, projected by the gate; None without a gate.
    """

    mean: torch.Tensor
    log_share: torch.Tensor
    gate: Projected | None

    def rows(self, start: int, stop: int) -> QueryTerms:
        """The terms of some rows of blocks."""
        gate = None
        if self.gate is not None:
            gate = self.gate[0][:, :, start:stop], self.gate[1][:, :, start:stop]
        return QueryTerms(self.mean[:, :, start:stop], self.log_share[:, start:stop], gate)


class KeyTerms(NamedTuple):
    """What scores read of the keys.

    Attributes:
        mean: `(B, K, A, D)`.
        log_share: `(B, A)`.
        gate: Two of `(B, K, A, d)`; None without a gate.
    """

    mean: torch.Tensor
    log_share: torch.Tensor
    gate: Projected | None

    def leading(self, num_sub_blocks: int) -> KeyTerms:
        """The terms of the first sub-blocks."""
        gate = None
        if self.gate is not None:
            gate = self.gate[0][:, :, :num_sub_blocks], self.gate[1][:, :, :num_sub_blocks]
        first = (self.mean[:, :, :num_sub_blocks], self.log_share[:, :num_sub_blocks])
        return KeyTerms(*first, gate)


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
    """The terms of keys `(B, S, K, D)`, of ⌈S / block_size⌉·P sub-blocks."""
    k, unrotated, hidden = _in_whole_blocks(k, unrotated, shape, hidden)
    size, K = shape.sub_block_size, shape.num_kv_heads
    mean, log_share = mean_of_sub_blocks(k, size, K, hidden)
    projected = None
    if gate is not None:
        projected = gate.project_keys(features_of_sub_blocks(unrotated, size, K, hidden))
    return KeyTerms(mean.squeeze(3), log_share, projected)


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
        reads_own_block: The terms are the P sub-blocks of the block itself. Else they are those of
            the block before it, and its own first query, which is as much as a sub-block.
    """
    q, unrotated, hidden = _in_whole_blocks(q, unrotated, shape, hidden)
    size, K, P = shape.sub_block_size, shape.num_kv_heads, shape.per_block
    mean, log_share = mean_of_sub_blocks(q, size, K, hidden)
    mean, log_share = unflatten(mean, 2, (-1, P)), unflatten(log_share, 1, (-1, P))
    features = features_of_sub_blocks(unrotated, size, K, hidden) if gate is not None else None
    if features is not None:
        features = unflatten(features, 2, (-1, P))
    if not reads_own_block:
        first = slice(None, None, shape.block_size)
        first_hidden = None if hidden is None else hidden[:, first]
        one, one_share = mean_of_sub_blocks(q[:, first], 1, K, first_hidden)
        mean = torch.cat([_from_block_before(mean, 2), one.unsqueeze(3)], 3)
        before = _from_block_before(log_share, 1, fill=-math.inf)
        log_share = torch.cat([before, one_share.unsqueeze(2)], 2)
        if features is not None:
            one = features_of_sub_blocks(unrotated[:, first], 1, K, first_hidden)
            features = torch.cat([_from_block_before(features, 2), one.unsqueeze(3)], 3)
    projected = None
    if gate is not None and features is not None:
        projected = gate.project_queries(features)
    return QueryTerms(mean, log_share, projected)


def block_scores(
    queries: QueryTerms,
    keys: KeyTerms,
    scale: float,
    per_block: int,
    *,
    first_row: int | None = None,
) -> torch.Tensor:
    """The estimated log mass `(B, K, rows, blocks)`, up to a constant of each row.

    Blocks far below the largest of their row, by more than about 87, all get one low value. A row
    without any term, or a block without any key, gets that value everywhere.

    Args:
        queries: Of the rows.
        keys: Of the blocks.
        scale: Factor of the scores of attention.
        per_block: P.
        first_row: In causal attention the first of the rows. Row i then depends on the blocks j < i
            alone, and its other entries have no meaning. None: all blocks are seen.
    """
    B, K, rows, T, G, _ = queries.mean.shape
    scores = (queries.mean.flatten(2, 4) * scale) @ keys.mean.transpose(-1, -2)
    scores = scores.view(B, K, rows, T, G, -1)
    shares = queries.log_share[:, None, :, :, None, None]
    gain = None
    if queries.gate is not None and keys.gate is not None:
        gain = correction(queries.gate, keys.gate).to(scores.dtype).unsqueeze(4)
        scores = scores + gain if gain.requires_grad else scores.add_(gain)
    # Without gradients all of this is in place: it is what selecting costs beside the products.
    learns = scores.requires_grad
    scores = scores + shares if learns else scores.add_(shares)
    if bool((keys.log_share != 0).any()):
        scores = scores + keys.log_share[:, None, None, None, None]
    # (B, K, rows, T·G, blocks, P)
    scores = unflatten(scores.flatten(3, 4), -1, (-1, per_block))
    finite = torch.finfo(scores.dtype)
    largest = scores.detach().amax(3).amax(-1)  # twice as fast as both at once
    is_future = None
    if first_row is not None:
        i = torch.arange(first_row, first_row + rows, device=scores.device).unsqueeze(1)
        is_future = torch.arange(largest.shape[-1], device=scores.device) >= i
        largest = largest.masked_fill(is_future, -torch.inf)
    largest = largest.amax(-1, keepdim=True).clamp_min(finite.min)
    shift = largest[..., None, :, None]
    below = scores - shift if learns else scores.sub_(shift)
    if is_future is not None:
        # Blocks of the future may exceed the largest of the past, and must not overflow.
        is_future = is_future[:, None, :, None]
        below = below.masked_fill(is_future, 0) if learns else below.masked_fill_(is_future, 0)
    shares_of_blocks = (below.exp() if learns else below.exp_()).sum(3).sum(-1)
    return shares_of_blocks.clamp_min(finite.tiny).log() + largest


def strips(queries: QueryTerms, num_keys: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 of the rows of blocks of each strip, so that its scores are few.

    Args:
        queries: Of all rows.
        num_keys: A, sub-blocks of keys.
    """
    B, K, N, T, G, _ = queries.mean.shape
    step = max(1, _STRIP // max(1, B * K * T * G * num_keys))
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
