"""Which sequences a call consists of: batch rows, documents, or batch rows without their padding.

Each sequence has blocks of its own, counted from its first position, and a pattern of its length.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple, cast

import torch
from dilated_core.inputs import document_bounds

from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.rule import PatternRule


class Sequences(NamedTuple):
    """Sequences of one length at the same positions of neighbouring batch rows.

    Attributes:
        rows: The batch rows.
        span: The positions.
        pattern: Of this length.
        key_padding_mask: `(rows, positions)` bool; None if every key is visible.
    """

    rows: slice
    span: slice
    pattern: BlockPattern
    key_padding_mask: torch.Tensor | None


def sequences_of(
    q: torch.Tensor,
    pattern: BlockPattern | PatternRule,
    block_size: int,
    *,
    cu_seqlens: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
) -> Iterator[Sequences]:
    """The sequences of a call that have positions; no position is in two of them.

    A pattern is for all S positions, or for the longest document; a shorter sequence takes its
    first rows and columns. A rule gives each sequence the pattern of its own length.

    With a mask, a sequence begins at the first visible key of its batch row. For a rule it ends
    at the last visible key, so that a padded sequence gets the pattern it has without padding.
    With a pattern it ends where the batch row ends.

    Args:
        q: `(B, S, H, D)`; `(1, T, H, D)` if packed.
        pattern: The kept blocks, or their rule.
        block_size: Positions of a block.
        cu_seqlens: Where documents begin, and T; None if not packed.
        key_padding_mask: `(B, S)` or None.

    Raises:
        ValueError: If a pattern is for another number of blocks, or `cu_seqlens` does not fit.
    """
    B, S = q.shape[:2]
    if isinstance(pattern, BlockPattern) and cu_seqlens is None:
        _check_whole(pattern, S, block_size)
    parts = spans_of(
        *(B, S, cu_seqlens, key_padding_mask), keep_end=isinstance(pattern, BlockPattern)
    )
    if isinstance(pattern, BlockPattern) and cu_seqlens is not None:
        longest = max((part.span.stop - part.span.start for part in parts), default=0)
        _check_longest(pattern, longest, block_size)
    if q.numel() == 0:
        return
    for rows, span, mask in parts:
        num_blocks = -(-(span.stop - span.start) // block_size)
        own = (
            _leading(pattern, num_blocks)
            if isinstance(pattern, BlockPattern)
            else pattern.pattern(num_blocks)
        )
        yield Sequences(rows, span, own, mask)


class Part(NamedTuple):
    """Sequences of one length at the same positions of neighbouring batch rows.

    Attributes:
        rows: The batch rows.
        span: The positions, one at least.
        key_padding_mask: `(rows, positions)` bool; None if every key is visible.
    """

    rows: slice
    span: slice
    key_padding_mask: torch.Tensor | None


def spans_of(
    batch_size: int,
    seq_len: int,
    cu_seqlens: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    *,
    keep_end: bool = False,
) -> list[Part]:
    """Where the sequences of `(B, S, …)` tensors are: documents, or batch rows without padding.

    Args:
        batch_size: B.
        seq_len: S.
        cu_seqlens: Where documents begin, and T; None if not packed.
        key_padding_mask: `(B, S)` or None.
        keep_end: Whether a sequence with a mask ends where its batch row ends, masked or not.

    Raises:
        ValueError: If `cu_seqlens` does not fit.
    """
    every = slice(0, batch_size)
    if cu_seqlens is not None:
        bounds = document_bounds(cu_seqlens, seq_len)
        parts = [Part(every, slice(a, b), None) for a, b in pairwise(bounds)]
    elif key_padding_mask is not None:
        parts = _without_padding(key_padding_mask, keep_end=keep_end)
    else:
        parts = [Part(every, slice(0, seq_len), None)]
    return [part for part in parts if part.span.stop > part.span.start]


def _without_padding(mask: torch.Tensor, *, keep_end: bool) -> list[Part]:
    """The sequences from the first visible key of each batch row to the last one.

    Args:
        mask: `(B, S)`, True for keys to leave out.
        keep_end: Whether a sequence ends where the batch row ends, masked or not.
    """
    S = mask.shape[1]
    visible = (~mask).to(torch.uint8)
    if S == 0:
        return []
    # argmax returns the first of equal values.
    starts = visible.argmax(1)
    stops = S - visible.flip(1).argmax(1)
    sees_any = visible.amax(1) > 0
    starts = torch.where(sees_any, starts, S)
    stops = torch.full_like(stops, S) if keep_end else torch.where(sees_any, stops, S)
    has_holes = (mask & _is_between(starts, stops, S)).any(1)
    table = torch.stack([starts, stops, has_holes.to(starts.dtype)], 1)
    bounds = cast("list[list[int]]", table.tolist())  # pyright: ignore
    found: list[Part] = []
    for (start, stop), group in groupby(enumerate(bounds), key=lambda item: tuple(item[1][:2])):
        members = list(group)
        rows, span = slice(members[0][0], members[-1][0] + 1), slice(start, stop)
        is_masked = any(member[1][2] for member in members)
        found.append(Part(rows, span, mask[rows, span] if is_masked else None))
    return found


def _is_between(starts: torch.Tensor, stops: torch.Tensor, seq_len: int) -> torch.Tensor:
    """`(B, S)`: from `starts` on and before `stops`, `(B,)` each."""
    positions = torch.arange(seq_len, device=starts.device)
    return (positions >= starts[:, None]) & (positions < stops[:, None])


def _check_whole(pattern: BlockPattern, seq_len: int, block_size: int) -> None:
    if pattern.num_blocks != (needed := max(1, -(-seq_len // block_size))):
        raise ValueError(
            f"the pattern has {pattern.num_blocks} blocks; {seq_len} positions in blocks of "
            f"{block_size} are {needed}, so build it for that number."
        )


def _check_longest(pattern: BlockPattern, longest: int, block_size: int) -> None:
    if pattern.num_blocks < (needed := -(-longest // block_size)):
        raise ValueError(
            f"the pattern has {pattern.num_blocks} blocks; the longest document has {longest} "
            f"positions, which in blocks of {block_size} are {needed}. Build it for the longest "
            f"document; shorter ones take its first rows and columns."
        )


@lru_cache(maxsize=64)
def _leading(pattern: BlockPattern, num_blocks: int) -> BlockPattern:
    """`BlockPattern.leading`; many documents have one length."""
    return pattern.leading(num_blocks)
