"""Patterns of blocks: which blocks of keys each block of queries sees.

N num_blocks, P lists. Block i is the positions from i · block_size on, counted over the whole
sequence, so shards may begin and end inside a block. Head h of H uses list h · P // H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeAlias, cast

import torch
from dilated_core import DilatedPattern
from dilated_core.checks import check_integer

from dilated_ring.plan.parcels import Heads

DEFAULT_BLOCK_SIZE = 64


class KeptBlocks(Protocol):
    """What a pattern of blocks offers, such as `dilated_sparse.BlockPattern`.

    A pattern is hashable and does not change.
    """

    @property
    def num_blocks(self) -> int:
        """N, blocks in each direction."""
        ...

    @property
    def num_heads(self) -> int:
        """P, heads with a list of their own; 1 if all heads share one."""
        ...

    def rows(self) -> Sequence[Sequence[Any]]:
        """For each of the P heads and N rows, the kept blocks, ascending: arrays or lists."""
        ...

    def __hash__(self) -> int: ...


class BlocksForLength(Protocol):
    """What builds the pattern of a length, such as `dilated_sparse.SparsePatternConfig`.

    Its text tells what it builds: ranks compare the texts. If it has a `block_size`, the pattern is
    for blocks of this size.
    """

    def pattern_for(self, seq_len: int, *, is_causal: bool) -> KeptBlocks:
        """The pattern for this many positions."""
        ...


class BlocksByLength(NamedTuple):
    """A pattern of blocks for each length: each document gets that of its own length."""

    source: BlocksForLength
    block_size: int


@dataclass(frozen=True)
class Blocks:
    """A pattern of blocks as a value that ranks can compare.

    Attributes:
        block_size: Positions of a block.
        num_blocks, num_lists: N and P.
        num_kept: Kept blocks of all lists together.
        checksum: Of the lists.
        offsets, columns: `(P, N + 1)` and `(num_kept,)`, int64 on the CPU: row i of list p is
            `columns[offsets[p, i] : offsets[p, i + 1]]`.
    """

    block_size: int
    num_blocks: int
    num_lists: int
    num_kept: int
    checksum: str
    offsets: torch.Tensor = field(repr=False, compare=False)
    columns: torch.Tensor = field(repr=False, compare=False)


Pattern: TypeAlias = "DilatedPattern | Blocks | BlocksByLength"
"""What determines which keys a query sees."""


def checked_blocks(
    pattern: KeptBlocks | BlocksForLength, block_size: int | None
) -> Blocks | BlocksByLength:
    """A pattern of users, checked as far as its length is known.

    Args:
        pattern: The blocks, or what builds them.
        block_size: Positions of a block; None: that of `pattern` if it has one, else 64.

    Raises:
        TypeError, ValueError: As of `blocks_of`; if `pattern` builds blocks of another size.
    """
    own = getattr(pattern, "block_size", None)
    if own is not None and block_size not in (None, own):
        raise ValueError(
            f"block_size is {block_size} and the pattern is for blocks of {own}; leave out "
            f"block_size, or build the pattern for it."
        )
    given = own if block_size is None else block_size
    size = check_integer("block_size", DEFAULT_BLOCK_SIZE if given is None else given, at_least=1)
    if isinstance(pattern, type) or not hasattr(pattern, "pattern_for"):
        return blocks_of(cast("KeptBlocks", pattern), size)
    try:
        hash(pattern)
    except TypeError:
        raise TypeError(
            f"pattern is a {type(pattern).__name__}, which is not hashable; ranks keep their plans "
            f"by pattern, so make it immutable, such as a frozen dataclass."
        ) from None
    return BlocksByLength(cast("BlocksForLength", pattern), size)


def blocks_of(pattern: KeptBlocks, block_size: int) -> Blocks:
    """A pattern of users as `Blocks`.

    Raises:
        TypeError: If it does not offer what `KeptBlocks` names, or `block_size` is no integer.
        ValueError: If a row keeps nothing, does not ascend or leaves the pattern; or if
            `block_size` is below 1.
    """
    size = check_integer("block_size", block_size, at_least=1)
    missing = [name for name in ("num_blocks", "num_heads", "rows") if not hasattr(pattern, name)]
    # A class has the names of its instances, but no values.
    if missing or isinstance(pattern, type):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}; it must be a DilatedPattern for dilated "
            f"attention, and for block-sparse attention have num_blocks, num_heads and rows(), as "
            f"dilated_sparse.local_window(num_blocks, window=1) has, or pattern_for."
        )
    return _converted(pattern, size)


@lru_cache(maxsize=64)
def _converted(pattern: KeptBlocks, size: int) -> Blocks:
    rows = [
        torch.as_tensor(row, dtype=torch.int64, device="cpu") for p in pattern.rows() for row in p
    ]
    N, P = pattern.num_blocks, pattern.num_heads
    if N < 1 or len(rows) != N * P:
        raise ValueError(
            f"the pattern has num_blocks {N}, num_heads {P} and {len(rows)} rows; it must have "
            f"num_blocks rows, one at least, for each of its heads."
        )
    columns, counts = torch.cat(rows), torch.tensor([row.shape[0] for row in rows], device="cpu")
    owners = torch.arange(N * P, device="cpu").repeat_interleave(counts)
    if not int(counts.min()):
        raise ValueError(
            f"row {int(counts.argmin()) % N} of the pattern keeps no block; every row must keep "
            f"one at least, such as the diagonal."
        )
    descends = (columns.diff() <= 0) & (owners.diff() == 0)
    if int(columns.min()) < 0 or int(columns.max()) >= N or bool(descends.any()):
        raise ValueError(
            f"a row of the pattern does not ascend, or holds blocks outside of 0 to {N - 1}; sort "
            f"each row and drop repetitions."
        )
    offsets = _offsets(owners, P, N)
    digest = blake2b(offsets.numpy().tobytes() + columns.numpy().tobytes(), digest_size=8)
    return Blocks(size, N, P, columns.shape[0], digest.hexdigest(), offsets, columns)


class Rows(NamedTuple):
    """The rows of a sequence: those of a pattern, cut to its length and to causality.

    Attributes:
        block_size: Positions of a block.
        num_blocks: n, of the sequence.
        offsets, columns: As of `Blocks`. Under causality the blocks below the diagonal.
        diagonal: `(P, n)`, whether row i keeps block i; under causality only, else False.
    """

    block_size: int
    num_blocks: int
    offsets: torch.Tensor
    columns: torch.Tensor
    diagonal: torch.Tensor

    def lists_of(self, heads: Heads) -> tuple[int, ...]:
        """The list of each head of q.

        Raises:
            ValueError: If the lists cannot be spread over all heads evenly.
        """
        num_lists = self.offsets.shape[0]
        first, total = heads.head_range
        if total % num_lists:
            raise ValueError(
                f"the pattern lists {num_lists} heads and there are {total}; it must list one, "
                f"which all share, or a number that divides the heads."
            )
        return tuple((first + h) * num_lists // total for h in range(heads.num_heads))

    def of_blocks(self, p: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The kept blocks of some rows of list p, and for each the index of its row in `blocks`."""
        starts = self.offsets[p, blocks]
        counts = self.offsets[p, blocks + 1] - starts
        row = torch.arange(blocks.shape[0], device="cpu").repeat_interleave(counts)
        return self.columns[expanded(starts, counts)], row


@lru_cache(maxsize=64)
def rows_of_sequence(blocks: Blocks | BlocksByLength, seq_len: int, *, is_causal: bool) -> Rows:
    """The rows of a sequence of this length: of its own pattern, or the leading ones of a longer.

    Raises:
        ValueError: If a row keeps only blocks that the sequence does not have, or that causality
            hides.
    """
    if isinstance(blocks, BlocksByLength):
        pattern = blocks.source.pattern_for(seq_len, is_causal=is_causal)
        blocks = blocks_of(pattern, blocks.block_size)
        check_length(blocks, seq_len, None)
    N, P = blocks.num_blocks, blocks.num_lists
    n = -(-seq_len // blocks.block_size)
    counts = blocks.offsets.diff().flatten()
    owner = torch.arange(N * P, device="cpu").repeat_interleave(counts)
    row, columns = owner % N, blocks.columns
    diagonal = torch.zeros(P * n, dtype=torch.bool, device="cpu")
    kept = (row < n) & (columns < n)
    if is_causal:
        diagonal[(owner // N * n + row)[kept & (columns == row)]] = True
        kept &= columns < row
    owner = (owner // N * n + row)[kept]
    offsets = _offsets(owner, P, n)
    empty = ((offsets.diff() == 0) & ~diagonal.view(P, n)).nonzero()
    if empty.shape[0]:
        why = (
            "blocks above the diagonal, and attention is causal"
            if is_causal
            else (f"blocks behind the {n} of a document")
        )
        raise ValueError(
            f"row {int(empty[0, 1])} of the pattern keeps only {why}; every row must keep a block "
            f"that its queries see, such as the diagonal."
        )
    return Rows(blocks.block_size, n, offsets, columns[kept], diagonal.view(P, n))


def check_length(
    blocks: Blocks | BlocksByLength, seq_len: int, bounds: Sequence[int] | None
) -> None:
    """Refuse a pattern for another number of blocks.

    Raises:
        ValueError: If it has not as many as the sequence, or fewer than the longest document.
    """
    if isinstance(blocks, BlocksByLength):
        return
    N, size = blocks.num_blocks, blocks.block_size
    if bounds is None and (needed := max(1, -(-seq_len // size))) != N:
        raise ValueError(
            f"the pattern has {N} blocks; {seq_len} positions of all ranks in blocks of {size} "
            f"are {needed}, so build it for that number."
        )
    if bounds is not None:
        longest = max((b - a for a, b in pairwise(bounds)), default=0)
        if -(-longest // size) > N:
            raise ValueError(
                f"the pattern has {N} blocks; the longest document has {longest} positions, which "
                f"in blocks of {size} are {-(-longest // size)}. Build it for the longest "
                f"document; shorter ones take its first rows and columns."
            )


def expanded(starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The numbers of runs, one after another: those from each start on, as many as its length.

    Example:
        >>> expanded(torch.tensor([4, 0]), torch.tensor([2, 3]))
        tensor([4, 5, 0, 1, 2])
    """
    ends = lengths.cumsum(0)
    total = int(ends[-1]) if ends.shape[0] else 0
    shifts = (starts - ends + lengths).repeat_interleave(lengths, output_size=total)
    return shifts + torch.arange(total, device=starts.device)


def _offsets(owner: torch.Tensor, num_lists: int, num_rows: int) -> torch.Tensor:
    """`offsets` from the ascending number p · num_rows + i of the row of each entry."""
    ends = torch.bincount(owner, minlength=num_lists * num_rows).cumsum(0).view(num_lists, num_rows)
    starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
    return torch.cat([starts.unsqueeze(1), ends], 1)
