"""Documents that are packed one after another: where each begins, and positions inside them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """How packed positions are divided into documents.

    Attributes:
        cu_seqlens: `(N + 1,)`, where each of N documents begins and the last one ends.
        positions: `(T,)`, int64, the distance of each position from the start of its document.
    """

    cu_seqlens: Tensor
    positions: Tensor

    @classmethod
    def of(cls, cu_seqlens: Tensor, counted: Tensor) -> Documents:
        """Count positions from the start of each document.

        Args:
            cu_seqlens: As in `dilated_core.dilated_attention`, which checks the values.
            counted: `(T,)`, int64, the positions counted through all documents: 0 … T − 1, or those
                that a rank holds of a sequence that is spread over ranks.

        Example:
            >>> Documents.of(torch.tensor([0, 2, 2, 5]), torch.arange(5)).positions
            tensor([0, 1, 0, 1, 2])
        """
        starts = cu_seqlens[:-1].long()
        # Of empty documents, which share their start with the next one, the last is found.
        index = torch.searchsorted(starts, counted, right=True) - 1
        return cls(cu_seqlens, counted - starts[index])
