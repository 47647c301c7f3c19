"""Keys, values and block summaries of texts, for attention that selects blocks by their content."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from dilated_core.checks import check_integer
from torch import Tensor

if TYPE_CHECKING:
    from dilated_sparse import AdaptiveCache


class SelectionHistory:
    """A `dilated_sparse.AdaptiveCache` for each text.

    A step selects blocks by their summaries and attends to these. Memory grows with the text; time
    for a token grows with the number of blocks.

    Args:
        batch_size: B.
        device: Of the memory.
        dtype: Of q, k and v.
        max_seq_len: Most tokens of a text; None for any number.

    Attributes:
        texts: The caches.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        max_seq_len: int | None,
    ) -> None:
        batch_size = check_integer("batch_size", batch_size, at_least=1)
        if max_seq_len is not None:
            max_seq_len = check_integer("max_seq_len", max_seq_len, at_least=1)
        self.max_seq_len, self.device, self.dtype = max_seq_len, torch.device(device), dtype
        self.texts = [_empty() for _ in range(batch_size)]

    @property
    def batch_size(self) -> int:
        """B, which `reorder` may change."""
        return len(self.texts)

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens of each text."""
        return tuple(text.length for text in self.texts)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, with the room for more, and of the summaries."""
        return sum(text.nbytes for text in self.texts)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        unrotated: tuple[Tensor, Tensor],
        counts: Sequence[int] | None,
        decode: Callable[..., Tensor],
    ) -> Tensor:
        """Append new tokens, and attend from them to the blocks that they select.

        Args:
            q: `(B, n, H, D)`.
            k, v: `(B, n, H_kv, D)`.
            unrotated: q and k before they are rotated by their positions.
            counts: How many of the n tokens of each text are not padding; None: all.
            decode: `AdaptiveSparseAttention.decode`.

        Returns:
            `(B, n, H, D)`, 0 for padding.
        """
        out = torch.zeros_like(q, dtype=self.dtype)
        tensors = [x.to(self.dtype) for x in (q, k, v, *unrotated)]
        for i, text in enumerate(self.texts):
            count = q.shape[1] if counts is None else counts[i]
            if count:
                one = [x[i : i + 1, :count] for x in tensors]
                out[i : i + 1, :count] = decode(*one[:3], text, unrotated=(one[3], one[4]))
        return out

    def reorder(self, batch_indices: Tensor) -> None:
        """Make text i a copy of what text `batch_indices[i]` was."""
        self.texts = [copy.deepcopy(self.texts[int(i)]) for i in batch_indices]

    def reset(self) -> None:
        """Forget all tokens."""
        self.texts = [_empty() for _ in self.texts]


def _empty() -> AdaptiveCache:
    from dilated_sparse import AdaptiveCache

    return AdaptiveCache()
