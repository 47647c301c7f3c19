"""Which strips cover a pattern: plan_strips."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple, TypeVar

from dilated_core.pattern.branches import DilatedPattern, HeadOffsets, head_offset, kept_rows
from dilated_core.strips.view import Strip

_T = TypeVar("_T")


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
