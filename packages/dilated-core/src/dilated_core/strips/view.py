"""Rows: what a head keeps of some segments as one strided view, so that nothing is gathered.

B batch, L positions of a tensor, H heads, D head_dim, w segment length, r dilation rate.

The rows that one head keeps in one segment are r positions apart; the segments are w positions
apart; and the next head of a branch starts either at the same offset or one position later. Each
of these is one stride of a `(B, L, H, D)` tensor, so a view of four dimensions

    (segments, rows, heads, D)   with strides   (w·L-stride, r·L-stride, head step, 1)

holds many (segment, head) problems at once and is all that a backend gets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, slots=True)
class Rows:
    """A strided view of `(B, L, H, …)` tensors. A strip is a pair of these, see `Problem`.

    Attributes:
        first_batch, num_batches: The batch rows it covers.
        start: Position, in the tensor, of the first row of the first head in the first segment.
        num_segments: Segments it covers.
        segment_length: Positions between them.
        num_rows: Rows that a head keeps in each of these segments.
        rate: Positions between rows.
        first_head, num_heads, head_step: The heads it covers.
        offset_step: Positions by which each next head starts later: 0 or 1.
        is_everything: The view is the whole tensor as it is.
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
    is_everything: bool

    def view(self, x: torch.Tensor) -> torch.Tensor:
        """These rows of a tensor, no copy.

        Args:
            x: `(B, L, H, …)`, with strides that `viewable` accepts.

        Returns:
            `(batches·segments, rows, heads, …)`.
        """
        if self.is_everything:
            return x
        batch_stride, position_stride, head_stride, *rest = x.stride()
        return x.as_strided(
            (self.num_batches * self.num_segments, self.num_rows, self.num_heads, *x.shape[3:]),
            (
                # With several batch rows *and* segments the plan made sure that the batch stride
                # is the segment stride continued.
                batch_stride if self.num_segments == 1 else self.segment_length * position_stride,
                self.rate * position_stride,
                self.head_step * head_stride + self.offset_step * position_stride,
                *rest,
            ),
            x.storage_offset()
            + self.first_batch * batch_stride
            + self.start * position_stride
            + self.first_head * head_stride,
        )

    @property
    def num_elements(self) -> int:
        """How many (batch, position, head) rows the view holds."""
        return self.num_problems * self.num_rows * self.num_heads

    @property
    def num_problems(self) -> int:
        """The first size of the view: independent problems for a backend."""
        return self.num_batches * self.num_segments

    def part(self, first: int, count: int) -> Rows:
        """The view without the problems before `first` and after `first + count`."""
        if self.num_segments == 1:
            batch = self.first_batch + first
            return replace(self, first_batch=batch, num_batches=count, is_everything=False)
        # Batch rows follow each other at the segments' stride, so counting on is right.
        start = self.start + first * self.segment_length
        return replace(self, num_batches=1, start=start, num_segments=count, is_everything=False)

    def of_heads(self, first: int, count: int) -> Rows:
        """The view without the heads before `first` and after `first + count`."""
        return replace(
            self,
            start=self.start + first * self.offset_step,
            first_head=self.first_head + first * self.head_step,
            num_heads=count,
            is_everything=False,
        )


def viewable(x: torch.Tensor) -> torch.Tensor:
    """`x` itself if it `is_viewable`, else a contiguous copy."""
    return x if is_viewable(x) else x.contiguous()


def is_viewable(x: torch.Tensor) -> bool:
    """Whether `Rows.view` and backends can take x `(B, L, H, D)` by its strides.

    Backends need unit stride along the last dimension. Memory that two elements share, as in
    expanded or unfolded tensors, does not count as viewable: kernels may not expect it.
    """
    return x.is_contiguous() or (x.stride(-1) == 1 and not _overlaps(x))


def is_batch_dense(*tensors: torch.Tensor) -> bool:
    """Whether in each tensor `(B, L, …)` a batch row starts where the last one ends."""
    if tensors[0].shape[0] == 1:
        return True
    return all(x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def _overlaps(x: torch.Tensor) -> bool:
    """Whether two elements may share memory; may be True for exotic strides that do not."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False
