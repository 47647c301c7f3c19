"""`BlockGate`: the learned correction of the estimate, which is 0 before training."""

from __future__ import annotations

import math

import torch
from torch import nn

Projected = tuple[torch.Tensor, torch.Tensor]
"""Features under the weights of each of the two forms."""


class BlockGate(nn.Module):
    """A bilinear form of pooled queries and keys, one for each head of k and v.

    The correction of sub-blocks with features f and g, each divided by its root mean square, is the
    difference of two forms, ((A₁f)·(B₁g) − (A₂f)·(B₂g)) / √d. Both forms begin with the same
    weights, so the correction begins at exactly 0 and every weight has a gradient from the first
    step on (Zhang et al., arXiv 1905.07777); a form with one factor of 0 would have none for the
    other factor.

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
        shape = (2, num_kv_heads, 3 * head_dim, gate_dim)
        self.query_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.key_weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters anew."""
        with torch.no_grad():
            for weight in (self.query_weight, self.key_weight):
                nn.init.normal_(weight[0], std=1 / math.sqrt(weight.shape[2]))
                weight[1].copy_(weight[0])

    def project_queries(self, features: torch.Tensor) -> Projected:
        """`(B, K, …, 3·D)` -> two of `(B, K, …, d)`."""
        first, second = _projected(features, self.query_weight)
        factor = 1 / math.sqrt(self.query_weight.shape[-1])
        return first * factor, second * factor

    def project_keys(self, features: torch.Tensor) -> Projected:
        """`(B, K, A, 3·D)` -> two of `(B, K, A, d)`."""
        return _projected(features, self.key_weight)


def _projected(features: torch.Tensor, weight: torch.Tensor) -> Projected:
    # Features of any size learn at one rate.
    features = features * features.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    # One product for each of the two forms: equal weights then give equal bits.
    rows = features.to(weight.dtype).flatten(2, -2)
    first, second = (rows @ part for part in weight)
    shape = (*features.shape[:-1], weight.shape[-1])
    return first.view(shape), second.view(shape)


def correction(queries: Projected, keys: Projected) -> torch.Tensor:
    """The correction `(B, K, …, A)` from what the gate projects.

    Args:
        queries: Two of `(B, K, …, d)`.
        keys: Two of `(B, K, A, d)`.
    """
    first, second = (
        x.flatten(2, -2) @ y.transpose(-1, -2) for x, y in zip(queries, keys, strict=True)
    )
    return (first - second).view(*queries[0].shape[:-1], -1)
