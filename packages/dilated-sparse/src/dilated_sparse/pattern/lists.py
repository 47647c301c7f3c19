"""The lists of a pattern: what they must be, and how they are made."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]


def check_lists(offsets: torch.Tensor, indices: torch.Tensor) -> None:
    """Check `row_offsets` `(P, N + 1)` and `block_indices` of a `BlockPattern`.

    Raises:
        ValueError: If they do not fit together, a block is out of range, a row is empty, or a row
            does not ascend.
    """
    if offsets.dim() != 2 or offsets.shape[1] < 2 or offsets.shape[0] < 1 or indices.dim() != 1:
        raise ValueError(
            f"row_offsets has shape {tuple(offsets.shape)} and block_indices "
            f"{tuple(indices.shape)}; they must be (heads, num_blocks + 1) and (kept blocks,), for "
            f"one block at least."
        )
    N, counts = offsets.shape[1] - 1, offsets.diff()
    follows = int(offsets[0, 0]) == 0 and torch.equal(offsets[1:, 0], offsets[:-1, -1])
    if not follows or int(offsets[-1, -1]) != indices.shape[0] or int(counts.min()) < 0:
        raise ValueError(
            f"row_offsets runs from {int(offsets[0, 0])} to {int(offsets[-1, -1])} and there are "
            f"{indices.shape[0]} block_indices; the rows must follow one another from 0 to the "
            f"number of indices, head by head."
        )
    if (empty := (counts == 0).nonzero()).numel():
        head, row = int(empty[0, 0]), int(empty[0, 1])
        raise ValueError(
            f"row {row} of head {head} keeps no block; every row must keep one at least, such as "
            f"the diagonal."
        )
    if (wrong := ((indices < 0) | (indices >= N)).nonzero()).numel():
        value = int(indices[int(wrong[0])])
        raise ValueError(
            f"block_indices holds {value}; the pattern has {N} blocks, so it must be from 0 to "
            f"{N - 1}."
        )
    is_first = torch.zeros_like(indices, dtype=torch.bool)
    is_first[offsets[:, :-1].flatten()] = True
    if bool(((indices.diff() <= 0) & ~is_first[1:]).any()):
        raise ValueError(
            "block_indices does not ascend within a row; sort each row and drop repetitions."
        )


def numbers(row: Sequence[int] | npt.NDArray[np.integer]) -> Ints:
    """The blocks of a row as an array."""
    array = np.asarray(row)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise TypeError(
            f"a row is {row!r}; it must list the numbers of its blocks, such as [0, 2]."
        )
    return array.astype(np.int64, copy=False)


def offsets_of(ends: torch.Tensor, num_heads: int) -> torch.Tensor:
    """`row_offsets` from where each row of each head ends."""
    ends = ends.view(num_heads, -1)
    starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
    return torch.cat([starts.unsqueeze(1), ends], dim=1)
