"""`BlockPattern`: which blocks of the attention matrix are kept, as lists of block numbers.

N num_blocks, P the number of heads that the pattern lists.

The lists are those of a compressed sparse row matrix, once for each head: `row_offsets`
`(P, N + 1)` and `block_indices`, left-packed. Memory is O(kept blocks + P·N), never O(N²).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt
import torch
from dilated_core.checks import check_integer, check_tensor

from dilated_sparse.pattern.lists import Ints, check_lists, numbers, offsets_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class BlockPattern:
    """Blocks of the attention matrix to keep: an immutable, hashable value.

    Block (i, j) is the queries of block i and the keys of block j. Blocks have no size here:
    `block_size` is an argument of attention.

    Args:
        row_offsets: `(P, N + 1)` int64, or `(N + 1,)` for P = 1. `row_offsets[p, i]` and
            `row_offsets[p, i + 1]` bound the entries of row i of head p in `block_indices`, so head
            0 begins at 0, and each other head where the last one ends.
        block_indices: int64, the kept blocks j of each row, ascending, without repetition. Every
            row keeps one at least.

    P = 1 is one pattern that all heads share. Tensors are copied to the CPU.

    Raises:
        TypeError: If an argument is no int64 tensor.
        ValueError: If offsets and indices do not fit together, a block is out of range, a row is
            empty, or a row is not ascending.

    Example:
        >>> pattern = BlockPattern.from_rows([[0], [0, 1], [0, 2]])
        >>> pattern.materialize(num_heads=1).int()
        tensor([[[1, 0, 0],
                 [1, 1, 0],
                 [1, 0, 1]]], dtype=torch.int32)
    """

    _row_offsets: torch.Tensor
    _block_indices: torch.Tensor

    def __init__(self, row_offsets: torch.Tensor, block_indices: torch.Tensor) -> None:
        for name, x in (("row_offsets", row_offsets), ("block_indices", block_indices)):
            check_tensor(name, x)
            if x.dtype != torch.int64:
                raise TypeError(f"{name} has dtype {x.dtype}; it must be int64.")
        # A tensor of inference mode can take no part in training, and patterns outlive the mode.
        with torch.inference_mode(False):
            offsets = row_offsets.detach().cpu().clone(memory_format=torch.contiguous_format)
            offsets = offsets.unsqueeze(0) if offsets.dim() == 1 else offsets
            indices = block_indices.detach().cpu().contiguous().clone()
        check_lists(offsets, indices)
        object.__setattr__(self, "_row_offsets", offsets)
        object.__setattr__(self, "_block_indices", indices)

    @classmethod
    def of_lists(cls, row_offsets: torch.Tensor, block_indices: torch.Tensor) -> BlockPattern:
        """The pattern of the lists of a pattern, which are neither checked nor copied."""
        pattern = cls.__new__(cls)
        object.__setattr__(pattern, "_row_offsets", row_offsets)
        object.__setattr__(pattern, "_block_indices", block_indices)
        return pattern

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a BlockPattern is immutable; {name} cannot be set.")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a BlockPattern is immutable; {name} cannot be deleted.")

    @classmethod
    def from_rows(cls, *heads: Sequence[Sequence[int] | npt.NDArray[np.integer]]) -> BlockPattern:
        """The pattern that keeps the listed blocks; one list of rows for each head.

        Args:
            *heads: For each head the blocks of row 0, of row 1 and so on, in any order.

        Raises:
            TypeError: If a row holds something else than integers.
            ValueError: As the class does; also if heads have different numbers of rows.
        """
        if len({len(rows) for rows in heads}) != 1:
            raise ValueError(
                f"the heads have {[len(rows) for rows in heads]} rows; give one head at least, and "
                f"as many rows for each."
            )
        rows = [np.unique(numbers(row)) for head in heads for row in head]
        return packed(rows, len(heads))

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> BlockPattern:
        """The pattern that keeps the True entries of `mask`, `(N, N)` or `(P, N, N)` bool."""
        check_tensor("mask", mask)
        shape = mask.shape
        if mask.dtype != torch.bool or len(shape) not in (2, 3) or shape[-1] != shape[-2]:
            raise ValueError(
                f"mask has shape {tuple(shape)} and dtype {mask.dtype}; it must be bool "
                f"(num_blocks, num_blocks), with the heads first if there are several patterns."
            )
        if 0 in shape:
            raise ValueError(f"mask has shape {tuple(shape)}; there must be one block at least.")
        mask = mask.detach().cpu()
        mask = mask if mask.dim() == 3 else mask.unsqueeze(0)
        counts = mask.sum(-1).flatten().cumsum(0)
        return cls(offsets_of(counts, mask.shape[0]), mask.nonzero()[:, 2].contiguous())

    @classmethod
    def per_head(cls, patterns: Sequence[BlockPattern]) -> BlockPattern:
        """One pattern of several heads from a pattern, shared or not, for each.

        Raises:
            TypeError: If an entry is no `BlockPattern`.
            ValueError: If there is none, or they are for different numbers of blocks.

        Example:
            >>> first, second = BlockPattern.from_rows([[0]]), BlockPattern.from_rows([[0]])
            >>> BlockPattern.per_head([first, second]).num_heads
            2
        """
        for pattern in patterns:
            check_pattern(pattern)
        if len({pattern.num_blocks for pattern in patterns}) != 1:
            raise ValueError(
                f"patterns have num_blocks {[pattern.num_blocks for pattern in patterns]}; give "
                f"one pattern at least, all for one number of blocks."
            )
        rows = [row for pattern in patterns for head in pattern.rows() for row in head]
        return packed(rows, sum(pattern.num_heads for pattern in patterns))

    @property
    def row_offsets(self) -> torch.Tensor:
        """`(P, N + 1)` int64, see the class. Must not be written to."""
        return self._row_offsets

    @property
    def block_indices(self) -> torch.Tensor:
        """`(kept blocks,)` int64, see the class. Must not be written to."""
        return self._block_indices

    @property
    def num_blocks(self) -> int:
        """N, blocks in each direction."""
        return self._row_offsets.shape[1] - 1

    @property
    def num_heads(self) -> int:
        """P, heads with a list of their own; 1 if all heads share one."""
        return self._row_offsets.shape[0]

    @property
    def num_kept(self) -> int:
        """Kept blocks, of all P heads together."""
        return self._block_indices.shape[0]

    @property
    def sparsity_ratio(self) -> float:
        """Fraction of blocks kept, of all N² of each head: 0.1 is a tenth of the work of dense."""
        return self.num_kept / (self.num_heads * self.num_blocks**2)

    @cached_property
    def causal_sparsity_ratio(self) -> float:
        """Fraction kept of the N·(N + 1)/2 blocks that causal attention has."""
        kept = int((self._block_indices <= self._row_numbers()).sum())
        return kept / (self.num_heads * self.num_blocks * (self.num_blocks + 1) // 2)

    def row(self, index: int, head: int = 0) -> torch.Tensor:
        """The kept blocks of one row, ascending; a view. A shared pattern answers for any head."""
        index = check_integer("index", index, at_least=0, at_most=self.num_blocks - 1)
        p = self._list_of(head)
        start, stop = self._row_offsets[p, index], self._row_offsets[p, index + 1]
        return self._block_indices[int(start) : int(stop)]

    def rows(self) -> list[list[Ints]]:
        """The kept blocks of each row of each of the P heads, as arrays that share memory."""
        indices: Ints = self._block_indices.numpy()
        offsets = cast("list[list[int]]", self._row_offsets.tolist())  # pyright: ignore
        return [[indices[a:b] for a, b in pairwise(head)] for head in offsets]

    def materialize(self, *, num_heads: int | None = None) -> torch.Tensor:
        """Bool `(H, N, N)`, True for kept blocks; for tests and plots, since it takes O(H·N²).

        Args:
            num_heads: H: any number if the pattern is shared, else a multiple of P, whose
                consecutive heads share one list, as heads of q share one of k. None: P.
        """
        H = (
            self.num_heads
            if num_heads is None
            else check_integer("num_heads", num_heads, at_least=1)
        )
        self.check_heads(H)
        N, P = self.num_blocks, self.num_heads
        dense = torch.zeros(P * N * N, dtype=torch.bool)
        heads = torch.arange(P).repeat_interleave(self._row_offsets.diff().sum(1))
        dense[(heads * N + self._row_numbers()) * N + self._block_indices] = True
        return dense.view(P, N, N).repeat_interleave(H // P, 0)

    def causal(self) -> BlockPattern:
        """The kept blocks at or below the diagonal: what causal attention uses of a pattern.

        Raises:
            ValueError: If a row keeps only blocks above the diagonal.
        """
        kept = self._block_indices <= self._row_numbers()
        counts = torch.zeros_like(kept, dtype=torch.int64)
        counts[kept] = 1
        ends = torch.cat([counts.new_zeros(1), counts.cumsum(0)])[self._row_offsets[:, 1:]]
        return BlockPattern(offsets_of(ends.flatten(), self.num_heads), self._block_indices[kept])

    def leading(self, num_blocks: int) -> BlockPattern:
        """The first `num_blocks` rows and columns: the pattern of a shorter sequence.

        Raises:
            ValueError: If there are fewer, or a row keeps only blocks behind them.
        """
        n = check_integer("num_blocks", num_blocks, at_least=1)
        if n > self.num_blocks:
            raise ValueError(
                f"num_blocks is {n} and the pattern has {self.num_blocks} blocks; build the "
                f"pattern for the longest sequence."
            )
        if n == self.num_blocks:
            return self
        return packed(
            [row[: int(np.searchsorted(row, n))] for head in self.rows() for row in head[:n]],
            self.num_heads,
        )

    def check_heads(self, num_heads: int) -> None:
        """Refuse a number of heads that the P lists cannot be spread over evenly.

        Raises:
            ValueError: If P does not divide it.
        """
        if num_heads % self.num_heads:
            raise ValueError(
                f"the pattern lists {self.num_heads} heads and there are {num_heads}; it must list "
                f"one, which all share, or a number that divides the heads."
            )

    def __or__(self, other: object) -> BlockPattern:
        """The blocks that either pattern keeps; a shared pattern joins each head of the other."""
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return _combined(self, other, np.union1d)

    def __and__(self, other: object) -> BlockPattern:
        """The blocks that both patterns keep; ValueError if a row would be empty."""
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return _combined(self, other, np.intersect1d)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockPattern):
            return NotImplemented
        return self is other or (
            torch.equal(self._row_offsets, other._row_offsets)
            and torch.equal(self._block_indices, other._block_indices)
        )

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self._row_offsets.numpy().tobytes(), self._block_indices.numpy().tobytes()))

    def __repr__(self) -> str:
        return (
            f"BlockPattern(num_blocks={self.num_blocks}, num_heads={self.num_heads}, "
            f"num_kept={self.num_kept}, sparsity_ratio={self.sparsity_ratio:.4g})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._row_offsets, self._block_indices)

    def __copy__(self) -> BlockPattern:
        return self

    def __deepcopy__(self, memo: object) -> BlockPattern:
        return self

    def plot(self, *, head: int = 0, ax: Any = None) -> Any:
        """Draw the kept blocks of a head; needs matplotlib. See `plotted`."""
        from dilated_sparse.pattern.export import plotted

        return plotted(self, head=head, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the lists to a safetensors file; needs safetensors, the extra `files`."""
        from dilated_sparse.pattern.export import save_pattern

        save_pattern(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BlockPattern:
        """Read a pattern that `save` has written, and check it; needs safetensors."""
        from dilated_sparse.pattern.export import load_pattern

        return load_pattern(Path(path))

    def to_block_mask(
        self,
        seq_len: int,
        *,
        block_size: int = 64,
        num_heads: int | None = None,
        is_causal: bool = False,
        device: torch.device | str = "cpu",
    ) -> BlockMask:
        """The same blocks for `torch.nn.attention.flex_attention`; see `block_mask_of`."""
        from dilated_sparse.pattern.export import block_mask_of

        return block_mask_of(
            self,
            seq_len,
            block_size=block_size,
            num_heads=num_heads,
            is_causal=is_causal,
            device=device,
        )

    def _row_numbers(self) -> torch.Tensor:
        """The row i of each entry of `block_indices`."""
        rows = torch.arange(self.num_blocks).repeat(self.num_heads)
        return rows.repeat_interleave(self._row_offsets.diff().flatten())

    def _list_of(self, head: int) -> int:
        """The list of a head; head 0 of a shared pattern stands for all."""
        if self.num_heads == 1:
            return 0
        return check_integer("head", head, at_least=0, at_most=self.num_heads - 1)


def check_pattern(pattern: object) -> None:
    """Refuse what is no `BlockPattern`.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(pattern, BlockPattern):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}; it must be a BlockPattern, such as "
            f"dilated_sparse.local_window(num_blocks, window=1)."
        )


def packed(rows: Sequence[Ints], num_heads: int) -> BlockPattern:
    """The pattern of rows `(P·N)` that are ascending."""
    ends = torch.tensor([row.shape[0] for row in rows], dtype=torch.int64).cumsum(0)
    indices = np.concatenate(rows) if rows else np.zeros(0, np.int64)
    return BlockPattern(offsets_of(ends, num_heads), torch.from_numpy(indices.astype(np.int64)))


def _combined(a: BlockPattern, b: BlockPattern, combine: Any) -> BlockPattern:
    if a.num_blocks != b.num_blocks:
        raise ValueError(
            f"the patterns have {a.num_blocks} and {b.num_blocks} blocks; they must be equal."
        )
    if 1 not in (a.num_heads, b.num_heads) and a.num_heads != b.num_heads:
        raise ValueError(
            f"the patterns list {a.num_heads} and {b.num_heads} heads; the numbers must be equal, "
            f"or one of them 1."
        )
    P = max(a.num_heads, b.num_heads)
    first, second = (x.rows() * (P // x.num_heads) for x in (a, b))
    rows = [
        combine(x, y)
        for head, other in zip(first, second, strict=True)
        for x, y in zip(head, other, strict=True)
    ]
    return packed(rows, P)
