"""How many (query, key) pairs each rank attends to: its share of the FLOPs."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from dilated_core import DilatedPattern, Span, head_offset, kept_rows

from dilated_ring.plan.blocks import Blocks, BlocksByLength, Pattern, rows_of_sequence
from dilated_ring.plan.parcels import Heads, parts_of_heads
from dilated_ring.plan.sequences import Spans, cut_sequences
from dilated_ring.plan.tiles import cut_into_tiles


def pairs_of_ranks(
    pattern: Pattern,
    heads: Heads,
    ranks: Spans,
    seq_len: int,
    bounds: Sequence[int] | None,
    *,
    is_causal: bool,
) -> tuple[int, ...]:
    """Pairs of each rank's queries with the keys of all ranks, over all heads.

    Pairs count once for each branch that has them; zero keys do not count, as in
    `DilatedPattern.flops`.

    Args:
        pattern, heads, ranks: Of the call.
        seq_len: S.
        bounds: Of the documents, from 0 to S; None: one sequence.
        is_causal: Whether queries see only the past.
    """
    if not isinstance(pattern, DilatedPattern):
        return _pairs_of_blocks(pattern, heads, ranks, seq_len, bounds, is_causal)
    if bounds is None:
        bounds = (0, seq_len)
    return tuple(
        sum(
            count * _pairs(pattern, heads, length, span, is_causal)
            for (length, span), count in Counter(_documents_of(spans, bounds)).items()
        )
        for spans in ranks
    )


def pairs_over_heads(
    pattern: Pattern,
    heads: Heads,
    ranks: Spans,
    seq_len: int,
    bounds: Sequence[int] | None,
    *,
    is_causal: bool,
) -> tuple[int, ...]:
    """Pairs of each rank's heads, over all positions; arguments as of `pairs_of_ranks`."""
    first, total = heads.head_range
    everything = ((Span(0, seq_len),),) if seq_len else ((),)
    pairs: list[int] = []
    for part, _ in parts_of_heads(heads.num_heads, heads.num_kv_heads, len(ranks)):
        mine = Heads(part.stop - part.start, 1, (first + part.start, total))
        pairs += pairs_of_ranks(pattern, mine, everything, seq_len, bounds, is_causal=is_causal)
    return tuple(pairs)


def _pairs_of_blocks(
    blocks: Blocks | BlocksByLength,
    heads: Heads,
    ranks: Spans,
    seq_len: int,
    bounds: Sequence[int] | None,
    is_causal: bool,
) -> tuple[int, ...]:
    pairs = [0] * len(ranks)
    for sequence in cut_sequences(ranks, seq_len, bounds, is_cut_only=False):
        if not sequence.seq_len:
            continue
        rows = rows_of_sequence(blocks, sequence.seq_len, is_causal=is_causal)
        # Only the last block may be short.
        missing = rows.num_blocks * rows.block_size - sequence.seq_len
        lengths = rows.block_size - (rows.columns == rows.num_blocks - 1) * missing
        upto = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        for p, num_heads in Counter(rows.lists_of(heads)).items():
            seen: list[int] = upto[rows.offsets[p]].diff().tolist()  # pyright: ignore
            diagonal: list[bool] = rows.diagonal[p].tolist()  # pyright: ignore
            for rank, pieces in enumerate(sequence.pieces):
                for part in cut_into_tiles(pieces, rows.block_size):
                    i, before = divmod(part.span.start, rows.block_size)
                    end = before + part.span.length
                    count = part.span.length * seen[i]
                    if diagonal[i]:
                        count += (end * (end + 1) - before * (before + 1)) // 2
                    pairs[rank] += num_heads * count
    return tuple(pairs)


def _documents_of(spans: tuple[Span, ...], bounds: Sequence[int]) -> Iterator[tuple[int, Span]]:
    """The length of each document that a rank holds positions of, and these positions in it."""
    for span in spans:
        i = bisect_right(bounds, span.start) - 1
        while i < len(bounds) - 1 and bounds[i] < span.stop:
            start, stop = bounds[i], bounds[i + 1]
            if start < stop:
                mine = Span(max(span.start, start) - start, min(span.stop, stop) - start)
                yield stop - start, mine
            i += 1


@lru_cache(maxsize=4096)
def _pairs(
    pattern: DilatedPattern, heads: Heads, seq_len: int, queries: Span, is_causal: bool
) -> int:
    """Pairs of some queries with all keys of their sequence."""
    total = 0
    first, all_heads = heads.head_range
    for w, rate in pattern.branches:
        w = min(w, seq_len)
        offsets = Counter(
            head_offset(first + h, rate, all_heads, pattern.head_offsets)
            for h in range(heads.num_heads)
        )
        for part, count in _parts(queries, w):
            begin = part.start // w * w
            length = min(w, seq_len - begin)
            for offset, num_heads in offsets.items():
                i = kept_rows(part.start - begin, rate, offset)
                j = kept_rows(part.stop - begin, rate, offset)
                # Query number n of a segment sees the keys 0 to n.
                seen = (i + j + 1) * (j - i) // 2
                pairs = seen if is_causal else (j - i) * kept_rows(length, rate, offset)
                total += num_heads * count * pairs
    return total


def _parts(queries: Span, w: int) -> Iterator[tuple[Span, int]]:
    """The parts of a span in segments of length w, alike complete ones once with their number."""
    start, stop = queries
    first, last = -(-start // w) * w, stop // w * w
    if first > last:
        yield queries, 1
        return
    if start < first:
        yield Span(start, first), 1
    if first < last:
        yield Span(first, first + w), (last - first) // w
    if last < stop:
        yield Span(last, stop), 1
