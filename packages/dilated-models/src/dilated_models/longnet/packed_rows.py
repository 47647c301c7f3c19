"""Rows of a batch without its padding."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedRows:
    """Rows of a batch that are no padding, one sequence after another.

    Args:
        padding: `(B, S)`.

    Attributes:
        cu_seqlens: `(B + 1,)`, where each sequence begins.
    """

    def __init__(self, padding: Tensor) -> None:
        self.shape = padding.shape
        self.at = (~padding).nonzero(as_tuple=True)
        counts = (~padding).sum(1)
        self.cu_seqlens = torch.cat((counts.new_zeros(1), counts.cumsum(0)))

    def taken_from(self, x: Tensor) -> Tensor:
        """`(B, S, …)` -> `(T, …)`."""
        return x[self.at]

    def put_back(self, x: Tensor) -> Tensor:
        """`(T, …)` -> `(B, S, …)`, 0 for padding."""
        return x.new_zeros(*self.shape, *x.shape[1:]).index_put(self.at, x)
