"""Select, attend and learn for sequences that begin at position 0.

Shapes: B batch, S positions, H heads, K heads of k and v, G = H/K, N blocks, M the most blocks that
a row keeps, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from dilated_core import AttentionOutput
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType]

from dilated_sparse.adaptive.bias import biased_attention
from dilated_sparse.adaptive.choice import choose_blocks
from dilated_sparse.adaptive.config import AdaptiveSparseConfig
from dilated_sparse.adaptive.gate import BlockGate
from dilated_sparse.adaptive.learning import (
    Columns,
    distillation_loss,
    kept_and_random,
    mass_in_strips,
)
from dilated_sparse.adaptive.ops import attend_selected
from dilated_sparse.adaptive.scores import (
    KeyTerms,
    QueryTerms,
    Shape,
    block_scores,
    key_terms,
    query_terms,
    strips,
)
from dilated_sparse.pattern.selection import BlockSelection


@dataclass(frozen=True, slots=True)
class Sequence:
    """The tensors of a call and its options. The caller switches autocast off.

    Attributes:
        config: The options.
        gate: The learned correction.
        q: `(B, S, H, D)`, S ≥ 1.
        k, v: `(B, S, K, D)`.
        unrotated: q and k before they are rotated.
        is_causal: Whether query i sees only keys j ≤ i.
        hidden: `(B, S)` bool, True for keys that nobody sees; or None.
        scale: Factor of the scores.
    """

    config: AdaptiveSparseConfig
    gate: BlockGate
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    unrotated: tuple[torch.Tensor, torch.Tensor]
    is_causal: bool
    hidden: torch.Tensor | None
    scale: float

    @property
    def shape(self) -> Shape:
        """The sizes that scores depend on."""
        config = self.config
        return Shape(self.k.shape[2], config.block_size, config.positions_per_mean)

    def terms(self) -> tuple[QueryTerms, KeyTerms]:
        """What scores read of the queries and keys; differentiable in the gate alone."""
        reads_own_block = self.config.lookahead or not self.is_causal
        return (
            query_terms(
                *(self.q, self.unrotated[0], self.shape, self.hidden, self.gate),
                reads_own_block=reads_own_block,
            ),
            key_terms(self.k, self.unrotated[1], self.shape, self.hidden, self.gate),
        )

    @torch.no_grad()
    def select(self) -> BlockSelection:
        """The blocks to keep."""
        return choose_blocks(
            *self.terms(), self.config.budget, scale=self.scale, is_causal=self.is_causal
        )

    def attend(
        self, selection: BlockSelection, dropout_p: float, dropout_seed: torch.Tensor | None
    ) -> AttentionOutput:
        """Attention over the kept blocks."""
        config = self.config

        def over(selection: BlockSelection, is_causal: bool) -> AttentionOutput:
            return attend_selected(
                *(self.q, self.k, self.v, selection),
                block_size=config.block_size,
                is_causal=is_causal,
                scale=self.scale,
                dropout_p=dropout_p,
                dropout_seed=dropout_seed,
                key_padding_mask=self.hidden,
                backend=config.backend,
            )

        if config.gate_gradient is None:
            return over(selection, self.is_causal)
        return biased_attention(
            over,
            selection,
            self.log_gains(selection),
            *(self.q.shape[1], config.block_size, self.q.shape[2] // self.k.shape[2]),
            is_causal=self.is_causal,
        )

    def log_gains(self, selection: BlockSelection) -> torch.Tensor:
        """`(B, K, N, M)`: what the learned correction adds to the estimate of each kept block."""
        queries, keys = self.terms()
        plain = queries._replace(gate=None), keys._replace(gate=None, sharpness=None)
        indices = selection.block_indices.long().clamp_min(0)
        gains: list[torch.Tensor] = []
        for start, stop in strips(queries, keys):
            learned, estimate = (
                block_scores(
                    *(q.rows(start, stop), k, self.scale),
                    first_row=start,
                    is_causal=self.is_causal,
                )
                for q, k in ((queries, keys), plain)
            )
            gains.append((learned - estimate).gather(-1, indices[:, :, start:stop]))
        return torch.cat(gains, 2)

    def noise(self) -> torch.Tensor:
        """Random numbers `(B, K, N, N)`, by which `loss` draws blocks that are not kept."""
        B, S, K, _ = self.k.shape
        N = -(-S // self.config.block_size)
        return torch.rand(B, K, N, N, device=self.k.device)

    def loss(
        self, selection: BlockSelection | None, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum of `distillation_loss` over rows of blocks, and their number.

        In causal attention, rows learn the mass of the blocks before their own, which is always
        kept.

        Args:
            selection: Learn from these blocks and random others; from all blocks if None.
            noise: What decides on the random ones; None: drawn here.
        """
        queries, keys = self.terms()
        N = queries.mean.shape[2]
        i = torch.arange(N, device=self.q.device)
        columns = None
        if selection is not None:
            noise = self.noise() if noise is None else noise
            there = i.unsqueeze(1) > i if self.is_causal else torch.ones_like(i.unsqueeze(1) > i)
            kept = selection.materialize()
            columns = kept_and_random(kept, there.expand(kept.shape), self.config.num_random, noise)
        total, number = self.q.new_zeros((), dtype=queries.mean.dtype), self.q.new_zeros(())
        measured = mass_in_strips(
            *(self.q, self.k, self.config.block_size, self.scale),
            is_causal=self.is_causal,
            hidden=self.hidden,
            columns=columns,
        )
        for rows, mass in measured:
            indices = i if columns is None else columns.indices[:, :, rows]
            if self.is_causal:
                mass = mass.masked_fill(indices == i[rows, None], 0)
            terms = queries.rows(rows.start, rows.stop)
            part = checkpoint(
                partial(_loss_of_rows, self.scale, self.is_causal),
                *(terms, keys, mass, rows, columns),
                use_reentrant=False,
            )
            total, number = total + part[0], number + part[1]
        return total, number


def _loss_of_rows(
    scale: float,
    is_causal: bool,
    queries: QueryTerms,
    keys: KeyTerms,
    mass: torch.Tensor,
    rows: slice,
    columns: Columns | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = block_scores(queries, keys, scale, first_row=rows.start, is_causal=is_causal)
    if columns is None:
        return distillation_loss(scores, mass)
    scores = scores.gather(-1, columns.indices[:, :, rows].clamp_min(0))
    return distillation_loss(scores, mass, columns.log_weights[:, :, rows])
