"""Choose segment lengths and dilation rates for a sequence length: `select_segments`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dilated_core.checks import check_bool, check_float_dtype, check_head_groups, check_integer
from dilated_core.pattern.branches import DilatedPattern


class Segments(NamedTuple):
    """Segment lengths and dilation rates: the arguments of everything that builds a pattern.

    Attributes:
        segment_lengths: w of each branch, in positions.
        dilation_rates: r of each branch, in positions.
    """

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    @property
    def pattern(self) -> DilatedPattern:
        """The pattern of these branches with the default options."""
        return DilatedPattern(self.segment_lengths, self.dilation_rates)


def select_segments(
    seq_len: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    first_segment_length: int = 2048,
    growth: int = 2,
    keep_every_position: bool = False,
    memory_budget: int | None = None,
) -> Segments:
    """Branches (w₀·aⁱ, aⁱ) until a segment covers the sequence (arXiv 2307.02486, section 2.2).

    A pure function: the same arguments give the same branches on every machine, and those of a
    shorter sequence are the first of those of a longer one. The first branch keeps every position;
    every branch shows a query at most w₀ keys, and all together less than w₀·a/(a − 1) on average,
    so time grows linearly with the length.

    A branch of rate r needs r heads to keep every position. Where r exceeds the number of heads,
    some positions see, and are seen, no further than the smaller branches reach; information from
    them travels further only through several layers. `keep_every_position` stops the rates at the
    largest power of `growth` that is at most `num_heads`, while segments still grow. Every position
    is then in reach, but a branch of rate R costs w/R² keys per query on average, and the last
    branch, of w = S, makes time quadratic again: with 8 heads and the defaults 1.3 times the keys
    at 65 536 positions and 9 times at a million.

    Args:
        seq_len: S, in positions.
        num_heads: H, of q.
        num_kv_heads: Heads of k and v, which `memory_budget` counts; `num_heads` if None.
        head_dim: D.
        dtype: Of k and v; their bytes count in `memory_budget`.
        first_segment_length: w₀, in positions.
        growth: a, at least 2. A larger one means fewer branches, hence less to merge, and larger
            gaps between the distances at which neighbouring branches see.
        keep_every_position: See above; for interleaved head offsets, and for blocked ones if
            `num_heads` is a multiple of the rates.
        memory_budget: Most bytes that the keys and values of one query may take, over all heads:
            2 · Σ ⌈w/r⌉ · H_kv · D · itemsize. A decoding cache holds these bytes and a streamed
            segment loads them; no other memory depends on the choice. w₀ is halved until they fit.

    Returns:
        The branches. A last segment longer than the sequence is clipped to it by attention.

    Raises:
        TypeError: If a count is not an integer, `keep_every_position` no bool or `dtype` no
            floating-point dtype.
        ValueError: If a number is out of range, or nothing fits `memory_budget`; the message says
            what does.

    Example:
        >>> select_segments(16_384, num_heads=8)
        Segments(segment_lengths=(2048, 4096, 8192, 16384), dilation_rates=(1, 2, 4, 8))
        >>> lengths, rates = select_segments(16_384, num_heads=8, memory_budget=24 * 2**20)
        >>> lengths
        (1024, 2048, 4096, 8192, 16384)
    """
    seq_len = check_integer("seq_len", seq_len, at_least=1)
    num_heads = check_integer("num_heads", num_heads, at_least=1)
    kv_heads = check_head_groups(num_heads, num_kv_heads)
    head_dim = check_integer("head_dim", head_dim, at_least=1)
    check_float_dtype(dtype)
    w0 = check_integer("first_segment_length", first_segment_length, at_least=1)
    growth = check_integer("growth", growth, at_least=2)
    check_bool("keep_every_position", keep_every_position)
    if memory_budget is not None:
        memory_budget = check_integer("memory_budget", memory_budget, at_least=1)
    largest_rate = num_heads if keep_every_position else None
    smallest: int | None = None
    for length in _halvings(w0):
        segments = _ladder(seq_len, length, growth, largest_rate)
        if memory_budget is None:
            return segments
        keys = sum(-(-min(w, seq_len) // r) for w, r in zip(*segments, strict=True))
        needed = 2 * keys * kv_heads * head_dim * dtype.itemsize
        if needed <= memory_budget:
            return segments
        smallest = needed if smallest is None else min(smallest, needed)
    raise ValueError(
        f"memory_budget is {memory_budget} bytes; with {kv_heads} heads of {head_dim} in {dtype}, "
        f"{seq_len} positions need at least {smallest}."
    )


def _ladder(seq_len: int, first_length: int, growth: int, largest_rate: int | None) -> Segments:
    lengths, rates = [first_length], [1]
    while lengths[-1] < seq_len:
        lengths.append(lengths[-1] * growth)
        capped = largest_rate is not None and rates[-1] * growth > largest_rate
        rates.append(rates[-1] if capped else rates[-1] * growth)
    return Segments(tuple(lengths), tuple(rates))


def _halvings(length: int) -> Iterator[int]:
    while length:
        yield length
        length //= 2
