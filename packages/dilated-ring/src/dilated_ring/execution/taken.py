"""Rows of a tensor that a task works on: a view where there is one, else a copy."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dilated_ring.plan.block_tiles import Runs


class Taken(NamedTuple):
    """Some rows and heads of `(B, L, H, …)` tensors, as several problems side by side.

    Attributes:
        rows: Which rows.
        heads: Which heads.
        num_problems: How many problems; each has an equal share of the rows.
    """

    rows: slice | Runs
    heads: slice = slice(None)
    num_problems: int = 1

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """`(B·num_problems, rows of a problem, heads, …)`."""
        return self._side_by_side(self._rows_of(x))

    def of_all_heads(self, x: torch.Tensor) -> torch.Tensor:
        """`(B·num_problems, rows of a problem)` from `(B, L)`."""
        taken = self._replace(heads=slice(None))
        return taken.take(x.unsqueeze(-1)).squeeze(-1)

    def put_(self, x: torch.Tensor, rows: torch.Tensor) -> None:
        """Write what `take` returned, changed, to its place in x."""
        if self._is_view_of(x):
            return
        rows, into = self._in_line(x, rows), x[:, :, self.heads]
        if isinstance(self.rows, slice):
            into[:, self.rows] = rows
        else:
            into.index_copy_(1, self.rows.numbers(), rows)

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """What to add to these rows of x: a view of x, or zeros for `add_`."""
        if self._is_view_of(x):
            return self.take(x)
        return torch.zeros_like(self.take(x))

    def add_(self, x: torch.Tensor, sums: torch.Tensor) -> None:
        """Add `sums`, to which gradients were added, to x. A row may be in several problems."""
        if self._is_view_of(x):
            return
        sums, into = self._in_line(x, sums), x[:, :, self.heads]
        if isinstance(self.rows, slice):
            into[:, self.rows] += sums
        else:
            into.index_add_(1, self.rows.numbers(), sums)

    def _is_view_of(self, x: torch.Tensor) -> bool:
        return isinstance(self.rows, slice) and (self.num_problems == 1 or x.shape[0] == 1)

    def _rows_of(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, :, self.heads]
        if isinstance(self.rows, slice):
            return x[:, self.rows]
        return x.index_select(1, self.rows.numbers())

    def _side_by_side(self, rows: torch.Tensor) -> torch.Tensor:
        if self.num_problems == 1:
            return rows
        each = rows.shape[1] // self.num_problems
        return rows.unflatten(1, (self.num_problems, each)).flatten(0, 1)  # pyright: ignore

    def _in_line(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(x.shape[0], -1, *rows.shape[2:])
