"""Packed documents as batches: those of one length are attended to together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch

# Shorter documents that do not lie side by side are copied side by side, so that many of them are
# one batch; for longer ones a call of their own costs less than the copies.
_COPIED_BELOW = 4096

# Positions copied at once, which bounds the memory of the copies.
_COPIED_POSITIONS = 2**16


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """Sequences that are attended to as one batch: documents of one length, or the whole tensors.

    Attributes:
        length: Positions of each; 0 for the whole tensors.
        count: How many.
        start: Position of the first one, if they lie side by side.
        index: int64, the positions of all of them, if they do not.
    """

    length: int = 0
    count: int = 0
    start: int = 0
    index: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Their rows of `(1, T, …)` as `(count, length, …)`: a view, or a copy with `index`."""
        if self.length == 0:
            return x
        shape = (self.count, self.length, *x.shape[2:])
        if self.index is None:
            return x[0, self.start : self.start + self.count * self.length].view(shape)
        return x[0].index_select(0, self.index.to(x.device)).view(shape)

    def room(self, x: torch.Tensor) -> torch.Tensor:
        """As `take`, but uninitialised with `index`: for results, which `put` then writes to x."""
        if self.index is None:
            return self.take(x)
        return x.new_empty(self.count, self.length, *x.shape[2:])

    def put(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Write what is in the `room` of x to x, unless it is a view of x."""
        if self.index is not None:
            x[0].index_copy_(0, self.index.to(x.device), rows.flatten(0, 1))


WHOLE = Sequences()
"""The tensors as they are."""


def group_documents(bounds: torch.Tensor, *, max_copied: int | None = None) -> list[Sequences]:
    """Group the documents of a packed sequence by length, shortest first; empty ones are left out.

    Args:
        bounds: int64 on the CPU, where each document begins and the last one ends, not decreasing.
        max_copied: Positions that may be copied at once; None for the default.
    """
    limit = _COPIED_POSITIONS if max_copied is None else max_copied
    lengths = bounds.diff()
    order = lengths.argsort(stable=True)
    starts = bounds[:-1][order]
    sizes, counts = (
        cast("list[int]", x.tolist())
        for x in torch.unique_consecutive(lengths[order], return_counts=True)  # pyright: ignore
    )
    groups: list[Sequences] = []
    first = 0
    for length, count in zip(sizes, counts, strict=True):
        group = starts[first : first + count]
        first += count
        if length:
            per_copy = limit // length if length < _COPIED_BELOW else 0
            groups.extend(_batches(group, length, per_copy))
    return groups


def _batches(starts: torch.Tensor, length: int, per_copy: int) -> Iterator[Sequences]:
    """Documents of one length: as they lie if that makes few batches, else copied together."""
    gaps = (starts.diff() != length).nonzero().flatten() + 1
    if len(gaps) and per_copy > 1:
        for part in torch.split(starts, per_copy):
            index = part[:, None] + torch.arange(length, device=part.device)
            yield Sequences(length, len(part), index=index.flatten())
        return
    for first, last in pairwise([0, *cast("list[int]", gaps.tolist()), len(starts)]):
        yield Sequences(length, last - first, int(starts[first]))
