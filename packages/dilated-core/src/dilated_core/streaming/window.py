"""The part of a sequence that streaming holds: the latest rows, and their results so far.

`Reader` checks what the source returns, `BranchRunner` runs the segments that a chunk completes,
`Window` keeps the rows that some branch still needs, and `stream_results` is the loop over chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch

from dilated_core.backends.contract import AttentionInputs, AttentionOptions
from dilated_core.backends.registry import choose_backend
from dilated_core.inputs import check_inputs
from dilated_core.merge import AttentionOutput, empty_partial, fold_
from dilated_core.pattern.branches import DilatedPattern, check_pattern
from dilated_core.strips.call import Call, forward
from dilated_core.strips.plan import Span

Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Source = Callable[[int, int], Rows]


class Reader:
    """The source of a call, with what it returns checked.

    Args:
        source: Returns the rows of a range.
        pattern: The branches; only checked.

    Raises:
        TypeError, ValueError: If what it returns for position 0 cannot be attended to.
    """

    def __init__(self, source: Source, pattern: DilatedPattern) -> None:
        self._source = source
        q, k, v = self._three_tensors(0, 1)
        check_pattern(pattern)
        check_inputs(q, k, v)
        self._expected = [_shape_without_length(x) for x in (q, k, v)]
        self.q, self.k = q, k
        self._check(0, 1, (q, k, v))

    def read(self, start: int, stop: int) -> Rows:
        """q, k, v of the positions from `start` to `stop`."""
        rows = self._three_tensors(start, stop)
        self._check(start, stop, rows)
        return rows

    def _three_tensors(self, start: int, stop: int) -> Rows:
        rows: Any = self._source(start, stop)
        is_sequence = isinstance(rows, (tuple, list))
        tensors = list(cast(Sequence[object], rows if is_sequence else ()))
        if len(tensors) != 3 or not all(isinstance(x, torch.Tensor) for x in tensors):
            raise TypeError(
                f"source({start}, {stop}) returned a {type(rows).__name__}; it must return a tuple "
                f"of three tensors, q, k and v."
            )
        q, k, v = cast(list[torch.Tensor], tensors)
        return q, k, v

    def _check(self, start: int, stop: int, rows: Rows) -> None:
        for name, x, expected in zip("qkv", rows, self._expected, strict=True):
            if _shape_without_length(x) != expected:
                raise ValueError(
                    f"source({start}, {stop}) returned {name} of shape {tuple(x.shape)}, {x.dtype} "
                    f"on {x.device}, and source(0, 1) something else; shapes may differ only in "
                    f"the number of positions, dtype and device not at all."
                )
            if x.shape[1] != stop - start:
                raise ValueError(
                    f"source({start}, {stop}) returned {x.shape[1]} positions of {name}; it must "
                    f"return {stop - start} positions."
                )


def _shape_without_length(x: torch.Tensor) -> tuple[object, ...]:
    return (x.dim(), *x.shape[:1], *x.shape[2:], x.dtype, x.device)


class _Group(NamedTuple):
    """Branches that complete the same rows in one step, so that one call serves them.

    Attributes:
        span: The positions these are.
        branches: Indices of the branches.
    """

    span: Span
    branches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BranchRunner:
    """Attention of some branches over whole segments of theirs.

    Attributes:
        pattern: The branches, with no w beyond the sequence.
        seq_len: S.
        is_causal, scale, backend: As users give them.
    """

    pattern: DilatedPattern
    seq_len: int
    is_causal: bool
    scale: float
    backend: str

    def ends(self, position: int) -> list[int]:
        """For each branch, where its last segment ends that is complete at `position`."""
        return [
            position if position == self.seq_len else position // w * w
            for w in self.pattern.segment_lengths
        ]

    def groups(self, ended: list[int], ends: list[int]) -> list[_Group]:
        """The groups to run when the branches' complete segments advance from `ended` to `ends`."""
        found: dict[Span, list[int]] = {}
        for i, span in enumerate(map(Span, ended, ends)):
            if span.length:
                found.setdefault(span, []).append(i)
        return [_Group(span, tuple(branches)) for span, branches in found.items()]

    def run(
        self, group: _Group, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> AttentionOutput:
        """Result of the branches of a group on its rows `(B, stop − start, H, D)`."""
        branches = [self.pattern.branches[i] for i in group.branches]
        inputs = AttentionInputs(
            q.device,
            q.dtype,
            num_heads=q.shape[2],
            head_dim=q.shape[3],
            num_kv_heads=k.shape[2],
            seq_len=self.seq_len,
        )
        call = Call(
            # The length at hand is what ranks backends; the plan needs that of the whole.
            choose_backend(self.backend, inputs._replace(seq_len=q.shape[1])),
            DilatedPattern(
                [w for w, _ in branches],
                [r for _, r in branches],
                head_offsets=self.pattern.head_offsets,
                padding=self.pattern.padding,
            ),
            inputs,
            AttentionOptions(self.is_causal, self.scale),
            head_range=(0, q.shape[2]),
            span=group.span,
        )
        return forward(call, q, k, v, cu_seqlens=None)


class Window:
    """The rows from `start` on that some branch still needs, and their results so far.

    Attributes:
        start: Position of the first row.
        stop: Position behind the last row.
    """

    def __init__(self, start: int) -> None:
        self.start = self.stop = start
        self._rows: Rows | None = None
        self._partial: AttentionOutput | None = None

    def append(self, rows: Rows) -> None:
        """Add the rows that follow; without rows before them, they are taken as they are."""
        first = self.stop - self.start
        self.stop += rows[0].shape[1]
        if self._rows is None:
            self._rows = rows
        else:
            for kept, new in zip(self._rows, rows, strict=True):
                kept[:, first:].copy_(new)

    def drop(self, stop: int, room: int, *, keep_partial: bool) -> None:
        """Forget the rows before `stop`; the others get memory of their own, and `room` rows more.

        The source may then reuse the memory of what it returned. Without `keep_partial`, no branch
        has gone beyond `stop` yet.
        """
        first, length = stop - self.start, self.stop - stop
        self.start = stop
        if not keep_partial:
            self._partial = None
        if length == 0:
            self._rows = None
        if self._rows is not None:
            q, k, v = (_moved(x, first, length, room) for x in self._rows)
            self._rows = q, k, v
        if self._partial is not None:
            out, lse = (_moved(x, first, length, room) for x in self._partial)
            out[:, length:] = 0
            lse[:, length:] = -torch.inf
            self._partial = AttentionOutput(out, lse)

    def run(self, runner: BranchRunner, ended: list[int], ends: list[int]) -> torch.Tensor | None:
        """Run the segments of the branches that lie between `ended` and `ends`.

        Returns:
            The results of the rows up to the least of `ends`, `(B, n, H, D)`; None if no branch
            goes on.
        """
        assert self._rows is not None
        groups = runner.groups(ended, ends)
        dtype = self._rows[0].dtype
        for group in groups:
            rows = slice(group.span.start - self.start, group.span.stop - self.start)
            result = runner.run(group, *(x[:, rows] for x in self._rows))
            if len(group.branches) == len(ends):
                return result.out
            self._fold(rows, result)
            dtype = result.out.dtype
        if not groups or self._partial is None:
            return None
        return self._partial.out[:, : min(ends) - self.start].to(dtype)

    def _fold(self, rows: slice, result: AttentionOutput) -> None:
        if self._partial is None:
            B, _, H, D = result.out.shape
            shape = (B, self.stop - self.start, H, D)
            self._partial = empty_partial(shape, dtype=result.out.dtype, device=result.out.device)
        out, lse = (x[:, rows] for x in self._partial)
        fold_(AttentionOutput(out, lse), result)


def _moved(x: torch.Tensor, first: int, length: int, room: int) -> torch.Tensor:
    """New memory for `length + room` rows that starts with `length` rows of x from `first` on."""
    moved = x.new_empty(x.shape[0], length + room, *x.shape[2:])
    moved[:, :length] = x[:, first : first + length]
    return moved


def stream_results(
    reader: Reader, runner: BranchRunner, chunk_length: int, done: int
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The results of all positions from `done` on, as (start, stop, out) in order.

    Chunks end at multiples of `chunk_length` wherever it starts, and a start in the middle repeats
    the steps that contribute to later rows: so each row is computed by the same calls, and has the
    same bits, whether or not a run was interrupted.
    """
    seq_len = runner.seq_len
    if done == seq_len:
        return
    position = done // chunk_length * chunk_length
    ended = runner.ends(position)
    window = Window(min(ended))
    if window.start < position:
        window.append(reader.read(window.start, position))
        room = min(chunk_length, seq_len - position)
        window.drop(window.start, room, keep_partial=False)
    while position < seq_len:
        stop = min(position + chunk_length, seq_len)
        window.append(reader.read(position, stop))
        ends = runner.ends(stop)
        out = window.run(runner, ended, ends)
        position, ended = stop, ends
        if min(ends) > done:
            assert out is not None
            yield done, min(ends), out
            done = min(ends)
        del out
        room = min(chunk_length, seq_len - position)
        window.drop(min(ends), room, keep_partial=max(ends) > min(ends))
