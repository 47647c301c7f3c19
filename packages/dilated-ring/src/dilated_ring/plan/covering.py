"""The blocks that dilated branches touch, as a pattern of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dilated_core import DilatedPattern, head_offset, kept_rows


@dataclass(frozen=True)
class CoveringBlocks:
    """The blocks in which some branch lets a query see a key, and the diagonal, for any length.

    Attributes:
        pattern: The branches, with `padding="masked"`.
        num_heads: H, all heads of the attention.
        block_size: Positions of a block.
    """

    pattern: DilatedPattern
    num_heads: int
    block_size: int

    def pattern_for(self, seq_len: int, *, is_causal: bool = False) -> _Covering:
        """The pattern for this many positions; causal attention skips what is above the diagonal.

        Example:
            >>> CoveringBlocks(DilatedPattern([4], [1]), 1, 2).pattern_for(8).rows()
            [[[0, 1], [0, 1], [2, 3], [2, 3]]]
        """
        return _covering(self, seq_len)


@dataclass(frozen=True, eq=False)
class _Covering:
    num_blocks: int
    lists: list[list[list[int]]]

    @property
    def num_heads(self) -> int:
        return len(self.lists)

    def rows(self) -> list[list[list[int]]]:
        return self.lists


@lru_cache(maxsize=64)
def _covering(source: CoveringBlocks, seq_len: int) -> _Covering:
    num_blocks = max(1, -(-seq_len // source.block_size))
    heads = [_rows_of_head(source, seq_len, num_blocks, head) for head in range(source.num_heads)]
    # One list if all heads keep the same blocks, as with rates up to the size of a block.
    return _Covering(num_blocks, heads if any(rows != heads[0] for rows in heads) else heads[:1])


def _rows_of_head(
    source: CoveringBlocks, seq_len: int, num_blocks: int, head: int
) -> list[list[int]]:
    pattern, size = source.pattern, source.block_size
    kept = [{i} for i in range(num_blocks)]
    for w, rate in pattern.branches:
        w = min(w, max(1, seq_len))
        offset = head_offset(head, rate, source.num_heads, pattern.head_offsets)
        for start in range(offset, seq_len, w):
            count = kept_rows(min(w, seq_len - start + offset), rate, offset)
            last = start + (count - 1) * rate
            # Rows that are closer than a block touch every block between them.
            positions = range(start, last + 1, rate if rate > size else size)
            blocks = {position // size for position in (*positions, *([last] if count else []))}
            for i in blocks:
                kept[i] |= blocks
    return [sorted(row) for row in kept]
