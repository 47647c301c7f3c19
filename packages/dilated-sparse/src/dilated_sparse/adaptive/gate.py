"""`BlockGate`: the learned correction of the estimate, which is 0 before training."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from dilated_sparse.adaptive.pooling import unflatten

# Distances are told apart by half octaves up to 2^13 sub-blocks; with sub-blocks of 16 these are
# 131,072 positions. Further ones count as this far.
_STEPS = 28


class GateQueries(NamedTuple):
    """What the correction reads of rows of blocks: two of `(B, K, N, d)`, one for each form."""

    first: Tensor
    second: Tensor

    def rows(self, start: int, stop: int) -> GateQueries:
        """Those of some rows."""
        return GateQueries(*(x[:, :, start:stop] for x in self))


class GateKeys(NamedTuple):
    """What the correction reads of sub-blocks of keys.

    Attributes:
        first, second: `(B, K, P, N, d)`, one for each form.
        by_distance: `(B, K, P, N, steps)`, what is added at each step of distance.
    """

    first: Tensor
    second: Tensor
    by_distance: Tensor

    def leading(self, num_blocks: int) -> GateKeys:
        """Those of the first blocks."""
        return GateKeys(*(x[:, :, :, :num_blocks] for x in self))

    def join(self, other: GateKeys) -> GateKeys:
        """Those of `self`, and of `other` behind them."""
        return GateKeys(*(torch.cat(pair, 3) for pair in zip(self, other, strict=True)))


class BlockGate(nn.Module):
    """What is added to the log of an estimate, for each head of k and v.

    The correction of a row of blocks with features f and a sub-block of keys with features g, at a
    distance of s sub-blocks, has two parts:

    - by content, the difference of two bilinear forms, ((A₁f)·(B₁g) − (A₂f)·(B₂g)) / √d. Both
      begin with the same weights, so the difference begins at exactly 0 and every weight has a
      gradient from the first step on (Zhang et al., arXiv 1905.07777); one form with a factor of 0
      would have none for the other factor;
    - by distance, w(s) + W(s)·g, which begins at 0, and is constant over each half octave of s: how
      far a head looks, and what it looks for at which distance.

    `sharpness` is added to the factor 1 of the log of the estimate: an estimate that reads
    other queries than those of the block is less sure than it looks.

    Args:
        num_kv_heads: K.
        head_dim: D.
        gate_dim: d, the rank of each of the two forms.
        device, dtype: Of the weights.
    """

    def __init__(
        self,
        num_kv_heads: int,
        head_dim: int,
        gate_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        K, D = num_kv_heads, head_dim

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.query_weight = weight(2, K, 4 * D, gate_dim)
        self.key_weight = weight(2, K, 3 * D, gate_dim)
        self.distance_bias = weight(K, _STEPS)
        self.distance_weight = weight(K, 3 * D, _STEPS)
        self.sharpness = weight(K)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew."""
        with torch.no_grad():
            for weight in (self.query_weight, self.key_weight):
                nn.init.normal_(weight[0], std=1 / math.sqrt(weight.shape[2]))
                weight[1].copy_(weight[0])
            for weight in (self.distance_bias, self.distance_weight, self.sharpness):
                nn.init.zeros_(weight)

    def project_queries(self, pooled: Tensor, first: Tensor) -> GateQueries:
        """The part of the queries.

        Args:
            pooled: `(B, K, N, 3·D)`, of the block of queries that a row reads.
            first: `(B, K, N, D)`, the first query of the row's own block.
        """
        rows = torch.cat([pooled * _unit(pooled), first * _unit(first)], -1)
        rows = rows.to(self.query_weight.dtype) / math.sqrt(self.query_weight.shape[-1])
        # One product for each of the two forms: equal weights then give equal bits.
        return GateQueries(*(rows @ weight for weight in self.query_weight))

    def project_keys(self, pooled: Tensor, per_block: int) -> GateKeys:
        """The part of the keys.

        Args:
            pooled: `(B, K, N·P, 3·D)`.
            per_block: P.
        """
        dtype = self.key_weight.dtype
        rows, unit = pooled.to(dtype), _unit(pooled).to(dtype)
        first, second, steps = (
            rows @ weight * unit for weight in (*self.key_weight, self.distance_weight)
        )
        parts = first, second, steps + self.distance_bias.unsqueeze(1)
        return GateKeys(*(unflatten(x, 2, (-1, per_block)).transpose(2, 3) for x in parts))


def _unit(x: Tensor) -> Tensor:
    """1 / root mean square of the last dimension: features of any size learn at one rate."""
    length = cast(Tensor, torch.linalg.vector_norm(x, dim=-1, keepdim=True))
    return length.square().div(x.shape[-1]).add(1e-6).rsqrt()


def correction(queries: GateQueries, keys: GateKeys, first_row: int) -> Tensor:
    """The correction `(B, K, n, P, N)`.

    Args:
        queries: Of n rows of blocks.
        keys: Of N blocks.
        first_row: The first of the rows.
    """
    B, K, P, N, d = keys.first.shape
    first, second = (
        (x @ y.reshape(B, K, P * N, d).transpose(-1, -2)).view(B, K, -1, P, N)
        for x, y in zip(queries, (keys.first, keys.second), strict=True)
    )
    steps = _steps_of_distance(first.shape[2], P, N, first_row, first.device)
    by_distance = keys.by_distance.movedim(-1, 2)
    return first.sub_(second) + by_distance.gather(2, steps.expand(first.shape))


def _steps_of_distance(rows: int, P: int, N: int, first_row: int, device: torch.device) -> Tensor:
    """`(n, P, N)`: which step the distance of a row from a sub-block is at.

    The distance is 0 for sub-blocks of the row's own block, and 1 for the ones next to it.
    """
    # All distances that occur are few; those of a row are a view of them.
    p = torch.arange(P, device=device)
    apart = torch.arange(first_row + rows - 1, first_row - N, -1, device=device)
    ahead = apart * P - p.unsqueeze(1)  # (P, blocks apart)
    distances = ahead.clamp_min(0) + (1 - P - ahead).clamp_min(0)
    steps = (2 * distances.clamp_min(1).float().log2()).long() + 1
    steps = steps.masked_fill(distances == 0, 0).clamp_max(_STEPS - 1)
    return steps.unfold(1, N, 1).flip(1).transpose(0, 1)
