"""Attention whose blocks are selected by a content: what selecting and learning cost.

K heads of k and v, G = H/K heads of q for each, N blocks of L positions, P sub-blocks of a block, T
terms of queries of a row of blocks, d the rank of the gate, as in `dilated_sparse.adaptive`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from dilated_models.config import LongNetConfig
from dilated_models.longnet.size import DISTANCE_STEPS
from dilated_models.planning.kinds import Product

MASS_STRIP = 2**22  # numbers of the scores between positions that are formed at once


class AdaptiveSizes(NamedTuple):
    """The sizes that selecting and learning depend on."""

    block_size: int
    num_blocks: int
    per_block: int
    terms: int
    num_kv_heads: int
    groups: int
    head_dim: int
    gate_dim: int

    @classmethod
    def of(cls, model: LongNetConfig, options: Any, seq_len: int) -> AdaptiveSizes:
        """Of a sequence."""
        L: int = options.block_size
        P: int = L // options.positions_per_mean
        T = _terms(L, options.positions_per_mean)
        K = model.num_kv_heads or model.nhead
        G = model.nhead // K
        return cls(L, -(-seq_len // L), P, T, K, G, model.head_dim, options.gate_dim)

    def scored(self, batch_size: int) -> float:
        """Blocks that are scored to select those of all rows, which is done in strips of rows."""
        N = self.num_blocks
        step = _rows_of_strip(batch_size, self)
        whole, rest = divmod(N, step)
        # A strip of rows that ends before row b scores the b − 1 blocks before its last row's own.
        blocks = step * (step * whole * (whole + 1) / 2 - whole)
        blocks += step * (step == 1)  # one block at least
        return blocks + rest * max(1, N - 1)

    def scores(self, blocks: float, times: int) -> float:
        """FLOPs of the estimate of so many blocks, without the gate."""
        flops = 2 * self.terms * self.groups * (self.head_dim + 1)
        return times * self.num_kv_heads * blocks * self.per_block * flops

    def corrections(self, blocks: float, times: int) -> float:
        """FLOPs of the learned part."""
        return times * self.num_kv_heads * blocks * self.per_block * 4 * self.gate_dim

    def projections(self, times: int) -> float:
        """FLOPs of what the gate reads of queries and keys."""
        D, d = self.head_dim, self.gate_dim
        keys = self.per_block * 2 * 3 * D * (2 * d + DISTANCE_STEPS)
        return times * self.num_kv_heads * self.num_blocks * (2 * 2 * 4 * D * d + keys)


@lru_cache(maxsize=64)
def _terms(block_size: int, sub_block_size: int) -> int:
    """T, read off the code that makes them, of one block of zeros."""
    from dilated_sparse.adaptive.scores import Shape, query_terms

    q = torch.zeros(1, block_size, 1, 1)
    shape = Shape(1, block_size, sub_block_size)
    return query_terms(q, q, shape, None, None, reads_own_block=False).mean.shape[3]


def _rows_of_strip(batch_size: int, sizes: AdaptiveSizes) -> int:
    """Rows of blocks that are scored at once: as the code that cuts them has it."""
    from dilated_sparse.adaptive.scores import KeyTerms, QueryTerms, strips

    _, N, P, T, K, G, D, _ = sizes
    # Views of one number: nothing is allocated.
    zero = torch.zeros(())
    queries = QueryTerms(zero.expand(batch_size, K, N, T, G, D), zero, None)
    keys = KeyTerms(zero, zero.expand(1, P, N), None, None)
    return next(iter(strips(queries, keys)))[1]


def kept_blocks(options: Any, num_blocks: int) -> int:
    """Blocks that a row of `num_blocks` keeps at most, its own among them."""
    budget = options.budget
    if budget.mass is not None:
        return num_blocks
    count = budget.topk
    if count is None:
        count = max(1, round(budget.sparsity_ratio * num_blocks))
    return min(num_blocks, max(count, forced_blocks(options)))


def forced_blocks(options: Any) -> int:
    """Blocks that each row keeps in any case, or as many as it has."""
    return 1 + options.local_blocks + options.sink_blocks


def pairs_of_adaptive(options: Any, seq_len: int) -> int:
    """Causal pairs of a head; with a budget of `mass`, of all blocks: the content decides."""
    from dilated_sparse.pattern.pairs import pairs_of_budget

    budget = options.budget
    if options.gate_gradient is not None:  # a call for each place in the lists of blocks
        L = options.block_size
        kept = kept_blocks(options, -(-seq_len // L))
        return pairs_of_budget(seq_len, L, count=1) + (kept - 1) * seq_len * L
    return pairs_of_budget(
        seq_len,
        options.block_size,
        ratio=budget.sparsity_ratio,
        count=budget.topk,
        at_least=forced_blocks(options),
    )


def products_of_adaptive(
    model: LongNetConfig, options: Any, seq_len: int, rows: int, *, learns: bool
) -> tuple[Product, ...]:
    """Selecting blocks, and in training learning to select them."""
    sizes = AdaptiveSizes.of(model, options, seq_len)
    # Training computes each sequence alone.
    batch_size = 1 if learns else rows
    blocks = sizes.scored(batch_size)
    select = sizes.projections(rows) + sizes.scores(blocks, rows) + sizes.corrections(blocks, rows)
    found = [_flops("selection of blocks", select, backward=0)]
    N, L = sizes.num_blocks, sizes.block_size
    all_scores, all_corrections = sizes.scores(N * N, rows), sizes.corrections(N * N, rows)
    if options.gate_gradient is not None:
        found += [
            _flops("estimate beside the gate", 2 * all_scores, backward=0),
            _flops("gate", all_corrections, backward=2),
            _flops("gate", sizes.projections(rows), backward=1),
        ]
    if not learns or options.distillation == "none":
        return tuple(found)
    mass = 2.0 * rows * model.nhead * L * L * sizes.head_dim * _measured_blocks(sizes, options)
    found += [
        _flops("mass of blocks, to learn from", mass, backward=0),
        # The backward pass computes the estimate once more, and differentiates the gate alone.
        _flops("estimate, to learn", all_scores, backward=1),
        _flops("gate", all_corrections, backward=3),
        _flops("gate", sizes.projections(rows), backward=1),
    ]
    return tuple(found)


def _measured_blocks(sizes: AdaptiveSizes, options: Any) -> float:
    """Blocks whose mass is measured, of all rows."""
    N, L = sizes.num_blocks, sizes.block_size
    if options.distillation == "kept":
        return float(N * (kept_blocks(options, N) + min(options.num_random, N)))
    heads = sizes.num_kv_heads * sizes.groups
    step = min(N, max(1, MASS_STRIP // max(1, heads * L * N * L)))
    whole, rest = divmod(N, step)
    return step * step * whole * (whole + 1) / 2 + rest * N


def _flops(name: str, flops: float, *, backward: float) -> Product:
    """Products of several shapes, which are all narrow."""
    return Product(name, flops / 2, 1, 1, backward=backward)
