"""Strips: the kept rows of a branch as strided views, so that nothing is gathered or scattered.

B batch, S sequence, H heads, D head_dim, w segment length, r dilation rate.

The rows that one head keeps in one segment are r positions apart; the segments are w positions
apart; and the next head of a branch starts either at the same offset or one position later. Each
of these is one stride of a `(B, S, H, D)` tensor, so a view of four dimensions

    (segments, rows, heads, D)   with strides   (w·S-stride, r·S-stride, head step, 1)

holds many (segment, head) problems at once and is all that a backend gets to see. Where heads move
on in both ways (groups of r heads that repeat the offsets), the plan takes the way that needs
fewer views: min(r, ⌈H/r⌉) per branch when r divides w.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch

from dilated_core.pattern import DilatedPattern, HeadOffsets, head_offset, kept_rows

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Strip:
    """A strided view of `(B, S, H, …)` tensors: equal attention problems of one branch.

    Attributes:
        first_batch, num_batches: The batch rows it covers.
        start: Position of the first row of the first head in the first segment.
        num_segments: Segments it covers, `segment_length` positions apart.
        segment_length: w.
        num_rows: M, the rows a head keeps in each of these segments.
        rate: r, positions between rows.
        first_head, num_heads, head_step: The heads of q it covers.
        first_kv_head, num_kv_heads, kv_head_step: The heads of k and v that these attend to, each
            serving `num_heads / num_kv_heads` consecutive ones.
        offset_step: Positions by which each next head starts later: 0 or 1.
        zero_keys: Zero keys that `padding="attended"` adds to each query when not causal.
        is_first: No strip earlier in the plan touches its rows.
        is_everything: Its views are the whole tensors as they are.
    """

    first_batch: int
    num_batches: int
    start: int
    num_segments: int
    segment_length: int
    num_rows: int
    rate: int
    first_head: int
    num_heads: int
    head_step: int
    first_kv_head: int
    num_kv_heads: int
    kv_head_step: int
    offset_step: int
    zero_keys: int
    is_first: bool
    is_everything: bool

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor with the heads of q.

        Args:
            x: `(B, S, H, …)`, any strides.

        Returns:
            `(batches·segments, M, num_heads, …)`, no copy.
        """
        if self.is_everything:
            return x
        return self._view(x, self.first_head, self.num_heads, self.head_step)

    def view_kv(self, x: torch.Tensor) -> torch.Tensor:
        """Its rows of a tensor with the heads of k and v, likewise.

        Args:
            x: `(B, S, H_kv, …)`, any strides.

        Returns:
            `(batches·segments, M, num_kv_heads, …)`, no copy.
        """
        if self.is_everything:
            return x
        return self._view(x, self.first_kv_head, self.num_kv_heads, self.kv_head_step)

    def _view(self, x: torch.Tensor, head: int, num_heads: int, step: int) -> torch.Tensor:
        batch_stride, seq_stride, head_stride, *rest = x.stride()
        return x.as_strided(
            (self.num_batches * self.num_segments, self.num_rows, num_heads, *x.shape[3:]),
            (
                # With several batch rows *and* segments the plan made sure that the batch stride
                # is the segment stride continued.
                batch_stride if self.num_segments == 1 else self.segment_length * seq_stride,
                self.rate * seq_stride,
                step * head_stride + self.offset_step * seq_stride,
                *rest,
            ),
            x.storage_offset()
            + self.first_batch * batch_stride
            + self.start * seq_stride
            + head * head_stride,
        )

    @property
    def num_elements(self) -> int:
        """How many (batch, position, head) rows the strip holds."""
        return self.num_batches * self.num_segments * self.num_rows * self.num_heads

    def split(self, max_elements: int) -> list[Strip]:
        """Cut it into strips of at most `max_elements` rows, as far as whole segments allow."""
        if self.num_elements <= max_elements:
            return [self]
        whole = replace(self, is_everything=False)
        problems = self.num_batches * self.num_segments
        step = max(1, max_elements // (self.num_rows * self.num_heads))
        parts: list[Strip] = []
        for first in range(0, problems, step):
            count = min(step, problems - first)
            if self.num_segments == 1:
                batch = self.first_batch + first
                parts.append(replace(whole, first_batch=batch, num_batches=count))
            else:
                # Batch rows follow each other at the segments' stride, so counting on is right.
                start = self.start + first * self.segment_length
                parts.append(replace(whole, num_batches=1, start=start, num_segments=count))
        return parts


@lru_cache(maxsize=1024)
def plan_strips(
    pattern: DilatedPattern,
    batch_size: int,
    seq_len: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    heads: tuple[int, int] | None = None,
    clip_length: int | None = None,
    is_batch_dense: bool = True,
) -> tuple[Strip, ...]:
    """The strips that cover every branch, undilated branches first.

    Args:
        pattern: The branches.
        batch_size: B.
        seq_len: S.
        num_heads: H.
        num_kv_heads: H_kv, which divides H; H if None.
        heads: First and last + 1 of the heads to cover, whole groups of H/H_kv; the strips count
            heads from the first of them. All if None.
        clip_length: Length to which a w beyond it is clipped; S if None. A longer one says that
            these S positions are the end of a longer sequence.
        is_batch_dense: Whether each batch row starts where the last one ends (batch stride =
            S · position stride) in every tensor that will be viewed.

    Returns:
        Strips in the order to run them. Every (branch, batch, segment, head) with at least one
        kept row is in exactly one of them.
    """
    strips: list[Strip] = []
    if seq_len == 0:
        return ()
    group = num_heads // (num_kv_heads or num_heads)
    covered = range(*(heads or (0, num_heads)))
    branches = sorted(pattern.branches, key=lambda branch: branch.dilation_rate)
    for i, (w, r) in enumerate(branches):
        w = min(w, clip_length or seq_len)
        offsets = {h: head_offset(h, r, num_heads, pattern.head_offsets) for h in covered}
        num_segments, tail = divmod(seq_len, w)
        for first_segment_start, segments, length in (
            (0, num_segments, w),
            (num_segments * w, 1, tail),
        ):
            if segments * length == 0:
                continue
            batching = _batching(batch_size, segments, is_batch_dense and tail == 0)
            for run in _head_runs(offsets, num_heads, r, length, pattern.head_offsets, group):
                offset = offsets[run.heads[0]]
                rows = kept_rows(length, r, offset)
                if rows == 0:
                    continue
                strips.extend(
                    Strip(
                        first_batch=first_batch,
                        num_batches=batches,
                        start=first_segment_start + first_segment * w + offset,
                        num_segments=count,
                        segment_length=w,
                        num_rows=rows,
                        rate=r,
                        first_head=run.heads[0] - covered.start,
                        num_heads=len(run.heads),
                        head_step=_step(run.heads),
                        first_kv_head=run.kv_heads[0] - covered.start // group,
                        num_kv_heads=len(run.kv_heads),
                        kv_head_step=_step(run.kv_heads),
                        offset_step=run.offset_step,
                        zero_keys=-(-w // r) - rows if pattern.padding == "attended" else 0,
                        is_first=i == 0,
                        is_everything=r == 1
                        and (batches, count, rows) == (batch_size, 1, seq_len)
                        and len(run.heads) == len(covered),
                    )
                    for first_batch, batches, first_segment, count in batching
                )
    return tuple(strips)


def _batching(
    batch_size: int, num_segments: int, is_mergeable: bool
) -> list[tuple[int, int, int, int]]:
    """Cut B × segments into (first batch, batches, first segment, segments), one stride each."""
    if batch_size == 1 or num_segments == 1 or is_mergeable:
        return [(0, batch_size, 0, num_segments)]
    if batch_size <= num_segments:
        return [(b, 1, 0, num_segments) for b in range(batch_size)]
    return [(0, batch_size, n, 1) for n in range(num_segments)]


class _Run(NamedTuple):
    """Heads that one view covers: equal steps, equal row counts.

    Attributes:
        heads: Heads of q, at one step.
        kv_heads: Heads of k and v, at one step; each for `len(heads) / len(kv_heads)` of `heads`.
        offset_step: Positions by which each next head starts later: 0 or 1.
    """

    heads: Sequence[int]
    kv_heads: Sequence[int]
    offset_step: int


def _head_runs(
    offsets: dict[int, int],
    num_heads: int,
    rate: int,
    length: int,
    head_offsets: HeadOffsets,
    group: int,
) -> list[_Run]:
    """Cut the heads, given with their offsets, into the fewest runs.

    Heads of one offset make runs, and so do heads whose offsets rise by one; in a segment whose
    length r does not divide, the latter break where the offsets above keep one row less.
    """
    same_offset: dict[int, list[int]] = {}
    rising_offset: dict[int, list[int]] = {}
    step = 1 if head_offsets == "interleaved" else -(-num_heads // rate)
    for head, offset in offsets.items():
        same_offset.setdefault(offset, []).append(head)
        run = rising_offset.get(head - step)
        if (
            run is not None
            and offsets[head - step] == offset - 1
            and kept_rows(length, rate, offset - 1) == kept_rows(length, rate, offset)
        ):
            run.append(head)
            rising_offset[head] = run
        else:
            rising_offset[head] = [head]
    rising = {run[0]: run for run in rising_offset.values()}
    return min(
        [run for heads in same_offset.values() for run in _sharing_runs(heads, group)],
        [run for heads in rising.values() for run in _rising_runs(heads, group)],
        key=len,
    )


def _rising_runs(heads: Sequence[int], group: int) -> Iterable[_Run]:
    """Cut heads that each start one position later: every one needs a kv head of its own view."""
    for part in _cut_at_constant_step([(head // group, head) for head in heads]):
        yield _Run([head for _, head in part], [kv_head for kv_head, _ in part], 1)


def _sharing_runs(heads: Sequence[int], group: int) -> Iterable[_Run]:
    """Cut heads of one offset where neighbours may attend to one kv head, equally many to each."""
    shares = [(kv, list(hs)) for kv, hs in groupby(heads, key=lambda head: head // group)]
    for _, equal in groupby(shares, key=lambda share: len(share[1])):
        for part in _cut_at_constant_step(list(equal)):
            yield _Run([h for _, hs in part for h in hs], [kv for kv, _ in part], 0)


def _cut_at_constant_step(items: Sequence[tuple[int, _T]]) -> list[list[tuple[int, _T]]]:
    """Cut a sequence of (number, …) so that the numbers of each part have one step."""
    parts: list[list[tuple[int, _T]]] = []
    for item in items:
        last = parts[-1] if parts else []
        if last and (len(last) == 1 or item[0] - last[-1][0] == last[1][0] - last[0][0]):
            last.append(item)
        else:
            parts.append([item])
    return parts


def _step(numbers: Sequence[int]) -> int:
    return numbers[1] - numbers[0] if len(numbers) > 1 else 1
