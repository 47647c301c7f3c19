"""Which columns of a batch are which sequences, read from position_ids and the 2-D mask.

position_ids are the authority, over the columns that the mask shows. Consecutive from 0 is one
sequence, and a restart at 0 begins another document. Segments count from the start of each.

B batch, n columns of queries, N columns of keys; the queries are the last n of the N columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_ASKED = (
    "they must be consecutive from 0, with a restart at 0 where a document begins; after a cache, "
    "consecutive from the number of tokens in it"
)


class Packed(NamedTuple):
    """The visible tokens of a batch, one after another.

    Attributes:
        rows, columns: `(T,)`, where each token lies.
        cu_seqlens: `(documents + 1,)`, where each document begins, and T.
    """

    rows: Tensor
    columns: Tensor
    cu_seqlens: Tensor


def find_documents(
    position_ids: Tensor | None, visible: Tensor | None, B: int, n: int
) -> Packed | None:
    """The documents of a batch without tokens before it; None if each row is one whole sequence.

    Args:
        position_ids: `(1, n)` or `(B, n)`; None: columns count from the first visible one.
        visible: `(B, n)` bool, or None: all.
        B: Rows.
        n: Columns.

    Raises:
        ValueError: If the positions have a gap.
    """
    if visible is None:
        if position_ids is None or _is_counted(position_ids, 0, n):
            return None
        visible = torch.ones(B, n, dtype=torch.bool, device=position_ids.device)
    rows, columns = visible.nonzero(as_tuple=True)
    is_first = torch.ones_like(rows, dtype=torch.bool)
    is_first[1:] = rows[1:] != rows[:-1]
    is_start = is_first
    if position_ids is not None:
        at = position_ids.expand(len(visible), n)[rows, columns]
        before = torch.nn.functional.pad(at[:-1], (1, 0))
        # Without position_ids of the caller, models count columns, so the padding too.
        is_begun = (at == 0) | (is_first & (at == columns))
        _check(is_begun | (~is_first & (at == before + 1)), at, rows, columns)
        is_start = is_first | (at == 0)
    starts = is_start.nonzero().flatten()
    return Packed(rows, columns, torch.nn.functional.pad(starts, (0, 1), value=len(rows)))


def find_continued(
    position_ids: Tensor | None, visible: Tensor | None, n: int, N: int
) -> list[tuple[Tensor, int]] | None:
    """The sequences of a batch with tokens before it; None if every column is a token.

    Args:
        position_ids: `(1, n)` or `(B, n)`, of the queries.
        visible: `(B, N)` bool, or None: all.
        n: Columns of queries.
        N: Columns of keys.

    Returns:
        For each row of the batch the columns that are tokens, and how many of them are queries.

    Raises:
        ValueError: If the positions do not continue the tokens before.
    """
    past = N - n
    if visible is None:
        if position_ids is not None and not _is_counted(position_ids, past, n):
            at = position_ids.flatten()
            columns = past + torch.arange(n, device=at.device).repeat(len(position_ids))
            rows = torch.arange(len(position_ids), device=at.device).repeat_interleave(n)
            _check(at == columns, at, rows, columns)
        return None
    if position_ids is not None:
        rows, columns = visible[:, past:].nonzero(as_tuple=True)
        at = position_ids.expand(len(visible), n)[rows, columns]
        seen = visible.cumsum(-1)
        # Where all padding is on the left, counting it too is the same up to a shift.
        is_left_padded = (visible[:, 1:] >= visible[:, :-1]).all(-1)
        columns = columns + past
        counts = at == seen[rows, columns] - 1
        _check(counts | (is_left_padded[rows] & (at == columns)), at, rows, columns)
    return [(row.nonzero().flatten(), int(row[past:].sum())) for row in visible]


def check_one_text(
    position_ids: Tensor | None, visible: Tensor | None, B: int, past: int, n: int
) -> None:
    """Refuse n new columns that do not continue the one text of each row of a cache.

    Args:
        position_ids: `(1, n)` or `(B, n)`, of the new columns.
        visible: `(B, past + n)` bool, or None: all.
        B: Rows.
        past: Columns in the cache.
        n: New columns.

    Raises:
        ValueError: If the positions have a gap, or a document begins inside a row.
    """
    if past:
        find_continued(position_ids, visible, n, past + n)
        return
    packed = find_documents(position_ids, visible, B, n)
    texts = B if visible is None else int(visible.any(-1).sum())
    if packed is not None and packed.cu_seqlens.numel() - 1 > texts:
        raise ValueError(
            "position_ids restart inside a row; a cache holds one text for each row, so give each "
            "document a row of its own, or use_cache=False."
        )


def _is_counted(position_ids: Tensor, first: int, n: int) -> bool:
    """Whether all rows are first … first + n − 1."""
    counted = torch.arange(first, first + n, device=position_ids.device, dtype=position_ids.dtype)
    return torch.equal(position_ids, counted.expand_as(position_ids))


def _check(is_good: Tensor, at: Tensor, rows: Tensor, columns: Tensor) -> None:
    if bool(is_good.all()):
        return
    bad = int((~is_good).nonzero()[0])
    before = ""
    if bad and int(rows[bad]) == int(rows[bad - 1]):
        before = f" after {int(at[bad - 1])}"
    raise ValueError(
        f"position_ids has {int(at[bad])}{before} in row {int(rows[bad])}, column "
        f"{int(columns[bad])}; {_ASKED}. Gaps also come from context parallelism, which gives each "
        f"rank a part of the sequence: for that use dilated_ring. For padded rows pass "
        f"position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0)."
    )
