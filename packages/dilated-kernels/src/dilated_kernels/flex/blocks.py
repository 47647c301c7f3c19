"""Lists of kept blocks as masks of flex_attention.

P lists, N blocks of positions, B batch, S positions, H heads of q. PyTorch's `BlockMask` has a row
of block numbers for each block of queries, and for backward one for each block of keys, each
padded to the longest. The rows come from the lists and the columns too, so no array of all pairs
of blocks is made, as PyTorch does where it derives the columns from the rows.

A mask has two sets of rows: blocks of which every pair is seen, and blocks that are evaluated pair
by pair, which are those on the diagonal of causal attention, or all of them with masked keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from dilated_core.backends.contract import AttentionOptions, BlockLists

from dilated_kernels.flex.mask import Mask, Mod, is_compiled

_MIN_TILE = 16  # smallest side of a matrix product in Triton
_TILES = 128  # every tile that PyTorch chooses by itself divides it


def block_reasons(kind: str, block_size: int | None) -> list[str]:
    """Reasons why flex_attention on this type of device cannot run over blocks of this size."""
    if kind == "cpu" or block_size is None or block_size % _MIN_TILE == 0:
        return []
    return [
        f"block_size is {block_size}; its block-sparse attention takes a multiple of {_MIN_TILE}."
    ]


def list_mask(
    blocks: BlockLists,
    q: torch.Tensor,
    options: AttentionOptions,
    *,
    has_columns: bool,
) -> Mask:
    """The mask of the listed blocks over q `(B, S, H, D)`, S ≥ 1.

    Args:
        blocks: The lists.
        q: For its shape.
        options: As for `BlockSparseBackend`.
        has_columns: Whether the mask is for backward, too.

    An eager call reads no lists. Its function of indices gets a table of all pairs of blocks,
    beside the S² scores that eager flex_attention makes anyway.
    """
    from torch.nn.attention.flex_attention import BlockMask

    S, H = q.shape[1:3]
    size, hidden = blocks.block_size, options.key_padding_mask
    rows, columns = _both(_Key(blocks), H, options.is_causal and hidden is None, hidden is not None)
    table = None if is_compiled(q.device.type) else _table(blocks, H)
    q_lists = (*columns.pairs, *columns.full) if has_columns else (None,) * 4
    block_mask = BlockMask(
        (S, S),
        *(*rows.pairs, *rows.full, *q_lists),
        BLOCK_SIZE=(size, size),
        mask_mod=_mask_mod(options.is_causal, hidden, table, size),
    )
    return Mask(block_mask, None, has_any_size=True, kernel_options=_kernel_options(size))


class _Lists(NamedTuple):
    """Padded lists `(counts (1, P, N), numbers (1, P, N, width))`, int32, or None twice.

    Attributes:
        pairs: Blocks that are evaluated pair by pair.
        full: Blocks of which every pair is seen.
    """

    pairs: tuple[torch.Tensor, torch.Tensor]
    full: tuple[torch.Tensor, torch.Tensor] | tuple[None, None]


class _Key:
    """Lists as a key of a cache: equal if they are the same tensors."""

    def __init__(self, blocks: BlockLists) -> None:
        self.blocks = blocks
        self._ids = (blocks.block_size, *map(id, blocks[1:]))

    def __hash__(self) -> int:
        return hash(self._ids)

    def __eq__(self, other: object) -> bool:
        # The cache keeps the tensors alive, so no other tensor has their ids.
        return isinstance(other, _Key) and self._ids == other._ids


@lru_cache(maxsize=64)  # the longest row is read from the device: once for all layers and steps
def _both(key: _Key, num_heads: int, has_diagonal: bool, in_pairs: bool) -> tuple[_Lists, _Lists]:
    """The lists by rows and by columns.

    Args:
        key: The lists.
        num_heads: H.
        has_diagonal: Whether blocks on the diagonal are evaluated pair by pair.
        in_pairs: Whether all blocks are.
    """
    _, row_offsets, key_blocks, column_offsets, query_blocks = key.blocks
    heads = num_heads // row_offsets.shape[0]
    if in_pairs:
        return (
            _Lists(_padded(row_offsets, key_blocks, heads), (None, None)),
            _Lists(_padded(column_offsets, query_blocks, heads), (None, None)),
        )
    if not has_diagonal:
        nothing = _alone(torch.zeros_like(row_offsets[:, 1:], dtype=torch.bool), heads)
        return (
            _Lists(nothing, _padded(row_offsets, key_blocks, heads)),
            _Lists(nothing, _padded(column_offsets, query_blocks, heads)),
        )
    # The block on the diagonal is the last one of a causal row, and the first one of a column.
    own = torch.arange(row_offsets.shape[1] - 1, device=row_offsets.device)
    has_own = row_offsets.diff() > 0
    if key_blocks.numel():
        has_own &= key_blocks[(row_offsets[:, 1:] - 1).clamp(min=0)] == own
    diagonal, skipped = _alone(has_own, heads), has_own.long()
    return (
        _Lists(diagonal, _padded(row_offsets, key_blocks, heads, fewer=skipped)),
        _Lists(
            diagonal, _padded(column_offsets, query_blocks, heads, fewer=skipped, later=skipped)
        ),
    )


def _padded(
    offsets: torch.Tensor,
    entries: torch.Tensor,
    heads: int,
    *,
    fewer: torch.Tensor | int = 0,
    later: torch.Tensor | int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entries between offsets `(P, N + 1)` as rows of one width; each is for `heads` heads.

    `fewer`, `later`: By how much a row is shorter and starts later, `(P, N)`.
    """
    starts, counts = offsets[:, :-1] + later, offsets.diff() - fewer
    # A width of 1 would be a constant of the compiled kernel.
    width = max(2, int(counts.max()))
    column = torch.arange(width, device=offsets.device)
    is_inside = column < counts.unsqueeze(-1)
    at = (starts.unsqueeze(-1) + column).where(is_inside, 0)
    # Kernels read the first number of an empty row, too.
    numbers = entries[at].where(is_inside, 0) if entries.numel() else at
    return _of_heads(counts, heads), _of_heads(numbers, heads)


def _alone(is_kept: torch.Tensor, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that hold the block on the diagonal or nothing; `is_kept` is `(P, N)` bool."""
    own = torch.arange(is_kept.shape[1], device=is_kept.device).expand_as(is_kept)
    return _of_heads(is_kept, heads), _of_heads(own.unsqueeze(-1), heads)


def _of_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """`(P, …)` as int32 `(1, 1, …)` or `(1, H, …)`: PyTorch has one list, or one for each head."""
    x = x if x.shape[0] == 1 else x.repeat_interleave(heads, 0)
    return x.int().unsqueeze(0).contiguous()


def _mask_mod(
    is_causal: bool, hidden: torch.Tensor | None, table: torch.Tensor | None, size: int
) -> Mod:
    """(b, h, i, j) -> whether query i sees key j of a kept block."""
    if hidden is None:
        seen = _earlier if is_causal else _every
    else:
        seen = _visible_earlier(hidden) if is_causal else _visible(hidden)
    return seen if table is None else _in_table(table, size, seen)


# A compiled kernel holds the numbers that these functions capture as constants, so they capture
# tensors alone.


def _every(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return j >= 0


def _earlier(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    return i >= j


def _visible(hidden: torch.Tensor) -> Mod:
    def seen(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return ~hidden[b, j]

    return seen


def _visible_earlier(hidden: torch.Tensor) -> Mod:
    def seen(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return (i >= j) & ~hidden[b, j]

    return seen


def _in_table(table: torch.Tensor, size: int, seen: Mod) -> Mod:
    def kept(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return table[h % table.shape[0], i // size, j // size] & seen(b, h, i, j)

    return kept


def _table(blocks: BlockLists, num_heads: int) -> torch.Tensor:
    """The kept blocks as `(1, N, N)` or `(H, N, N)` bool."""
    P, N = blocks.row_offsets.shape[0], blocks.row_offsets.shape[1] - 1
    row = torch.arange(P * N, device=blocks.row_offsets.device)
    row = row.repeat_interleave(blocks.row_offsets.diff().flatten())
    table = torch.zeros(P, N, N, dtype=torch.bool, device=blocks.row_offsets.device)
    table.view(P * N, N)[row, blocks.key_blocks.long()] = True
    return table if P == 1 else table.repeat_interleave(num_heads // P, 0)


def _kernel_options(size: int) -> dict[str, Any]:
    """One kernel for all lengths, with tiles that divide a block.

    PyTorch has another kernel for fewer than 128 queries, whose tiles depend on their number.
    """
    options: dict[str, Any] = {"BACKEND": "TRITON"}
    if size % _TILES:
        tile = size & -size
        sides = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1")
        options |= dict.fromkeys((*sides, "bwd_BLOCK_M2", "bwd_BLOCK_N2"), tile)
    return options
