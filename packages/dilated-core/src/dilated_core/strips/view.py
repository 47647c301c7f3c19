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

from dataclasses import dataclass, replace
from typing import TypeVar

import torch

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
