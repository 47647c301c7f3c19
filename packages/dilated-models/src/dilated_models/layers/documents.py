"""Documents that are packed one after another: where each begins, and positions inside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """How T packed positions are divided into documents.

    Attributes:
        cu_seqlens: `(N + 1,)`, where each of N documents begins and the last one ends.
        positions: `(T,)`, int64, the distance of each position from the start of its document.
    """

    cu_seqlens: Tensor
    positions: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, num_positions: int) -> Documents:
        """Count positions from the start of each document.

        Args:
            cu_seqlens: As in `dilated_core.dilated_attention`, which checks the values.
            num_positions: T.

        Example:
            >>> Documents.of(torch.tensor([0, 2, 2, 5]), 5).positions
            tensor([0, 1, 0, 1, 2])
        """
        starts = cu_seqlens[:-1].long()
        counted = torch.arange(num_positions, device=cu_seqlens.device)
        # Of empty documents, which share their start with the next one, the last is found.
        index = torch.searchsorted(starts, counted, right=True) - 1
        return cls(cu_seqlens, counted - starts[index])
