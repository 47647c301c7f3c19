"""Which blocks a backend attends to in one call: tasks of query blocks that keep equally many.

Rows of a pattern that keep equally many blocks make one rectangular problem: their query blocks as
a batch, and the key blocks of each, side by side, as its keys. Where the key blocks of such rows
are runs that move on evenly, as in a local window, the keys are a strided view; elsewhere they are
gathered, few enough at a time to stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from dilated_sparse.pattern.blocks import BlockPattern
from dilated_sparse.pattern.lists import Ints

# Keys and values gathered for one call. On two CPU cores with 1 MiB of L2 each and 32 MiB of L3, a
# forward over 5 or 26 blocks of 64 is within a tenth of its best from 1 to 4 MiB, and a fifth
# slower at 8 MiB.
_GATHERED_BYTES = 2**21

# A GPU needs large calls instead; this bounds what they copy.
_GATHERED_BYTES_GPU = 2**28


def gathered_bytes(device: torch.device) -> int:
    """How many bytes of keys and values one call gathers at most."""
    return _GATHERED_BYTES if device.type == "cpu" else _GATHERED_BYTES_GPU


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One call of the backend: some query blocks, over as many key blocks each.

    Attributes:
        heads, kv_heads: Heads of q, and of k and v, that it covers.
        rows: int64, its query blocks; of equal length, so the short last block is alone.
        first_row: Its first query block, if its query blocks follow one another; else None.
        columns: int64 `(rows · count,)`, the key blocks of each row.
        count: Key blocks of each row.
        num_queries: Positions of a query block.
        num_keys: Positions of the key blocks of a row together.
        first_column, column_step: If the key blocks of each row follow one another, and those of
            each next row start `column_step` blocks later: the first of the first row; else None.
        is_causal: The last key block is the query block, and query i sees keys j ≤ i of it.
        is_first: No earlier task has these queries and heads.
    """

    heads: slice
    kv_heads: slice
    rows: torch.Tensor
    first_row: int | None
    columns: torch.Tensor
    count: int
    num_queries: int
    num_keys: int
    first_column: int | None
    column_step: int
    is_causal: bool
    is_first: bool


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the tasks of a call depend on, beside the pattern.

    Attributes:
        seq_len: S.
        block_size: Positions of a block.
        is_causal: Whether query i sees only the keys j ≤ i.
        takes_earlier_keys: Whether the backend is an `EarlierKeysBackend`. Others get the blocks on
            the diagonal in tasks of their own.
        num_heads: H.
        num_kv_heads: H_kv.
        row_bytes: Bytes of one position of one head of k, and of the batch rows together.
        device: Of the tensors.
    """

    seq_len: int
    block_size: int
    is_causal: bool
    takes_earlier_keys: bool
    num_heads: int
    num_kv_heads: int
    row_bytes: int
    device: torch.device


@lru_cache(maxsize=64)
def plan_tasks(pattern: BlockPattern, geometry: Geometry) -> tuple[Task, ...]:
    """The tasks of a call; every kept block of every head is in exactly one of them.

    Raises:
        ValueError: If the call is causal and a row keeps only blocks above the diagonal.
    """
    if geometry.is_causal:
        pattern = pattern.causal()
    return tuple(
        task
        for p, rows in enumerate(pattern.rows())
        for heads, kv_heads in _heads_of_list(p, pattern.num_heads, geometry)
        for task in _tasks_of_heads(rows, heads, kv_heads, geometry)
    )


def _heads_of_list(p: int, num_lists: int, geometry: Geometry) -> Iterator[tuple[slice, slice]]:
    """Slices of the heads of q that share list p, and of the heads of k and v that they use."""
    H, K = geometry.num_heads, geometry.num_kv_heads
    heads, group = H // num_lists, H // K
    first, stop = p * heads, (p + 1) * heads
    if heads % group == 0:
        yield slice(first, stop), slice(first // group, stop // group)
        return
    # The list is for a part of the heads that share a head of k, or for parts of several groups.
    while first < stop:
        end = min(stop, (first // group + 1) * group)
        yield slice(first, end), slice(first // group, first // group + 1)
        first = end


def _tasks_of_heads(
    rows: list[Ints], heads: slice, kv_heads: slice, geometry: Geometry
) -> Iterator[Task]:
    N = len(rows)
    last_length = geometry.seq_len - (N - 1) * geometry.block_size
    has_tail = last_length < geometry.block_size
    numbers = np.arange(N)
    is_tail_row = (numbers == N - 1) & has_tail
    has_diagonal = np.zeros(N, dtype=bool)
    if geometry.is_causal:
        # The last block of a causal row is the highest it keeps.
        has_diagonal = np.array([row[-1] == i for i, row in enumerate(rows)])
    is_split = geometry.is_causal and not geometry.takes_earlier_keys
    if is_split:
        rows = [row[: len(row) - d] for row, d in zip(rows, has_diagonal.tolist(), strict=True)]
        for is_tail in (False, True):
            length = last_length if is_tail else geometry.block_size
            sizes = _Sizes(length, length, is_causal=True, is_first=True)
            members = numbers[has_diagonal & (is_tail_row == is_tail)]
            for part in _parts(members, 1, kv_heads, geometry):
                yield _task(part, part[:, None], heads, kv_heads, sizes, geometry)
    counts = np.array([len(row) for row in rows])
    reaches_tail = np.array([has_tail and len(row) > 0 and row[-1] == N - 1 for row in rows])
    order = np.lexsort((numbers, has_diagonal, reaches_tail, is_tail_row, counts))
    keys = np.stack([counts, is_tail_row, reaches_tail, has_diagonal], axis=1)[order]
    borders = np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1
    for members in np.split(order, borders):
        count = int(counts[members[0]])
        if count == 0:
            continue
        num_queries = last_length if is_tail_row[members[0]] else geometry.block_size
        num_keys = count * geometry.block_size
        if reaches_tail[members[0]]:
            num_keys += last_length - geometry.block_size
        sees_own = bool(has_diagonal[members[0]])
        sizes = _Sizes(
            num_queries,
            num_keys,
            is_causal=sees_own and not is_split,
            is_first=not (sees_own and is_split),
        )
        for part in _parts(members, count, kv_heads, geometry):
            columns: Ints = np.stack([rows[int(i)] for i in part])  # pyright: ignore
            yield _task(part, columns, heads, kv_heads, sizes, geometry)


def _parts(members: Ints, count: int, kv_heads: slice, geometry: Geometry) -> list[Ints]:
    """Cut rows that keep `count` blocks into parts of which one call gathers the keys."""
    if len(members) == 0:
        return []
    num_kv_heads = kv_heads.stop - kv_heads.start
    row = 2 * count * geometry.block_size * geometry.row_bytes * num_kv_heads
    step = max(1, gathered_bytes(geometry.device) // row)
    return [members[i : i + step] for i in range(0, len(members), step)]


class _Sizes(NamedTuple):
    """Attributes of a `Task` of these names."""

    num_queries: int
    num_keys: int
    is_causal: bool
    is_first: bool


def _task(
    part: Ints, columns: Ints, heads: slice, kv_heads: slice, sizes: _Sizes, geometry: Geometry
) -> Task:
    """The task of some query blocks and the key blocks `(rows, count)` of each."""
    first = columns[:, 0]
    step = int(first[1] - first[0]) if len(first) > 1 else 0
    is_run = step >= 0 and bool((np.diff(columns) == 1).all() and (np.diff(first) == step).all())
    return Task(
        heads,
        kv_heads,
        torch.from_numpy(part.copy()).to(geometry.device),
        int(part[0]) if (np.diff(part) == 1).all() else None,
        torch.from_numpy(columns.flatten()).to(geometry.device),
        columns.shape[1],
        first_column=int(first[0]) if is_run else None,
        column_step=step,
        **sizes._asdict(),
    )
