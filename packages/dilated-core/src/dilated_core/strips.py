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

from dataclasses import dataclass
from functools import lru_cache

import torch

from dilated_core.pattern import DilatedPattern, HeadOffsets, kept_rows


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
        first_head, num_heads, head_step: The heads it covers.
        offset_step: Positions by which each next head starts later: 0 or 1.
        zero_keys: Zero keys that `padding="attended"` adds to each query when not causal.
        is_first: No strip earlier in the plan touches its rows.
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
    offset_step: int
    zero_keys: int
    is_first: bool

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """The strip's rows of `x`: `(B, S, H, …)` -> `(batches·segments, M, heads, …)`, no copy."""
        batch_stride, seq_stride, head_stride, *rest = x.stride()
        return x.as_strided(
            (
                self.num_batches * self.num_segments,
                self.num_rows,
                self.num_heads,
                *x.shape[3:],
            ),
            (
                # With several batch rows *and* segments the plan made sure that the batch stride
                # is the segment stride continued.
                batch_stride if self.num_segments == 1 else self.segment_length * seq_stride,
                self.rate * seq_stride,
                self.head_step * head_stride + self.offset_step * seq_stride,
                *rest,
            ),
            x.storage_offset()
            + self.first_batch * batch_stride
            + self.start * seq_stride
            + self.first_head * head_stride,
        )

    @property
    def num_elements(self) -> int:
        """How many (batch, position, head) rows the strip holds."""
        return self.num_batches * self.num_segments * self.num_rows * self.num_heads


@lru_cache(maxsize=1024)
def plan_strips(
    pattern: DilatedPattern,
    batch_size: int,
    seq_len: int,
    num_heads: int,
    *,
    is_batch_dense: bool = True,
) -> tuple[Strip, ...]:
    """The strips that cover every branch, undilated branches first.

    Args:
        pattern: The branches.
        batch_size: B.
        seq_len: S.
        num_heads: H.
        is_batch_dense: Whether each batch row starts where the last one ends (batch stride =
            S · position stride) in every tensor that will be viewed.

    Returns:
        Strips in the order to run them. Every (branch, batch, segment, head) with at least one
        kept row is in exactly one of them.
    """
    strips: list[Strip] = []
    if seq_len == 0:
        return ()
    branches = sorted(pattern.branches, key=lambda branch: branch.dilation_rate)
    for i, (w, r) in enumerate(branches):
        w = min(w, seq_len)
        num_segments, tail = divmod(seq_len, w)
        for first_segment_start, segments, length in (
            (0, num_segments, w),
            (num_segments * w, 1, tail),
        ):
            if length == 0:
                continue
            batching = _batching(batch_size, segments, is_batch_dense and tail == 0)
            for offset, rows, first_head, heads, head_step, offset_step in _head_runs(
                num_heads, r, length, pattern.head_offsets
            ):
                zero_keys = -(-w // r) - rows if pattern.padding == "attended" else 0
                strips.extend(
                    Strip(
                        first_batch=first_batch,
                        num_batches=batches,
                        start=first_segment_start + first_segment * w + offset,
                        num_segments=count,
                        segment_length=w,
                        num_rows=rows,
                        rate=r,
                        first_head=first_head,
                        num_heads=heads,
                        head_step=head_step,
                        offset_step=offset_step,
                        zero_keys=zero_keys,
                        is_first=i == 0,
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


def _head_runs(
    num_heads: int, rate: int, length: int, head_offsets: HeadOffsets
) -> list[tuple[int, int, int, int, int, int]]:
    """Cut the heads into runs with one stride and one row count each, in the fewest runs.

    Returns:
        Tuples (offset of the first head, rows, first head, heads, head step, offset step).
    """
    if head_offsets == "interleaved":  # head = group · rate + offset
        offset_step_head, same_offset_step = 1, rate
        num_offsets, num_groups = min(rate, num_heads), -(-num_heads // rate)
    else:  # head = offset · group size + index
        num_groups = -(-num_heads // rate)
        offset_step_head, same_offset_step = num_groups, 1
        num_offsets = -(-num_heads // num_groups)

    def heads_from(first: int, step: int, at_most: int) -> int:
        return min(at_most, -(-(num_heads - first) // step))

    same_offset = [
        (offset, kept_rows(length, rate, offset), first, heads, same_offset_step, 0)
        for offset in range(num_offsets)
        if (first := offset * offset_step_head) < num_heads
        and (heads := heads_from(first, same_offset_step, num_groups)) > 0
    ]
    # Offsets below length mod rate keep one row more than those above: two runs where both occur.
    longer = length % rate
    moving_offset = [
        (low, kept_rows(length, rate, low), first, heads, offset_step_head, 1)
        for group in range(num_groups)
        for low, high in ((0, longer), (longer, num_offsets))
        if low < min(high, num_offsets)
        and (first := group * same_offset_step + low * offset_step_head) < num_heads
        and (heads := heads_from(first, offset_step_head, min(high, num_offsets) - low)) > 0
    ]
    runs = min(same_offset, moving_offset, key=len)
    return [run for run in runs if run[1] > 0]
