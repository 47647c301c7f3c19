"""One launch per branch: the geometry of each branch on a sequence or on packed documents."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from dilated_core import DilatedPattern
from dilated_core.inputs import document_bounds


class PlacedBranch(NamedTuple):
    """One branch on the given sequence or documents.

    Attributes:
        number: Its place in the pattern, from 0.
        segment_length: w, clipped to the sequence.
        rate: r.
        num_segments: Segments per head and batch row.
        max_rows: The most rows that a head keeps in a segment.
        segments: With documents, int64 `(num_segments, 3)`: see `locate_rows`.
    """

    number: int
    segment_length: int
    rate: int
    num_segments: int
    max_rows: int
    segments: torch.Tensor | None


def place_branches(
    pattern: DilatedPattern, seq_len: int, cu_seqlens: torch.Tensor | None
) -> list[PlacedBranch]:
    """The branches in the order of their launches: the highest dilation first, r = 1 last."""
    bounds = None if cu_seqlens is None else document_bounds(cu_seqlens, seq_len)
    branches: list[PlacedBranch] = []
    for number, (w, r) in enumerate(pattern.branches):
        w = min(w, seq_len)
        if bounds is None or cu_seqlens is None:
            branches.append(PlacedBranch(number, w, r, -(-seq_len // w), -(-w // r), None))
            continue
        rows = [
            (start, min(w, stop - start), min(w, last - first))
            for first, last in pairwise(bounds)
            for start, stop in ((s, last) for s in range(first, last, w))
        ]
        longest = max((length for _, length, _ in rows), default=1)
        # Named: under another default device there would be no numbers to copy.
        table = torch.tensor(rows, dtype=torch.int64, device="cpu")
        table = table.to(cu_seqlens.device, non_blocking=True)
        branches.append(PlacedBranch(number, w, r, len(rows), -(-longest // r), table))
    return sorted(branches, key=lambda branch: -branch.rate)


@lru_cache(maxsize=1024)
def count_slots(num_heads: int, num_kv_heads: int, rate: int, pattern: DilatedPattern) -> int:
    """The most offsets that heads of q with one head of k and v have: see `heads_of_slot`."""
    group = num_heads // num_kv_heads
    if pattern.head_offsets == "interleaved":
        return min(group, rate)
    run = -(-num_heads // rate)
    return max(((g + 1) * group - 1) // run - g * group // run + 1 for g in range(num_kv_heads))
