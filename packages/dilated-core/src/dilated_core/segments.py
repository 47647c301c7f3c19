"""Choose segment lengths and dilation rates for a sequence length: `select_segments`.

And `DynamicDilatedAttention`, the module that asks it at every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn

from dilated_core.attention import dilated_attention
from dilated_core.config import DilatedAttentionConfig
from dilated_core.pattern import DilatedPattern, HeadOffsets, Padding


class Segments(NamedTuple):
    """Segment lengths and dilation rates, as everything that builds a pattern takes them.

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

    A branch of rate r needs r heads to keep every position between them. Where r exceeds the number
    of heads, some positions see, and are seen, no further than the branches before reach; layers
    pass on what they hold. `keep_every_position` stops the rates at the largest power of `growth`
    that is at most `num_heads`, with segments that go on growing: no position is then out of reach,
    but a branch of rate R costs w/R² keys per query on average, and the last one, of w = S, makes
    time quadratic again. With 8 heads and the defaults that is 1.3 times the keys at 65 536
    positions and 9 times at a million.

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
            2 · Σ ⌈w/r⌉ · H_kv · D · itemsize. That is what a decoding cache holds and a streamed
            segment loads, and the only memory that the choice changes. w₀ is halved until it fits.

    Returns:
        The branches. A last segment longer than the sequence is clipped to it by attention.

    Raises:
        TypeError: If a count is not an integer.
        ValueError: If a number is out of range, or nothing fits `memory_budget`; the message says
            what does.

    Example:
        >>> select_segments(16_384, num_heads=8)
        Segments(segment_lengths=(2048, 4096, 8192, 16384), dilation_rates=(1, 2, 4, 8))
        >>> lengths, rates = select_segments(16_384, num_heads=8, memory_budget=24 * 2**20)
        >>> lengths
        (1024, 2048, 4096, 8192, 16384)
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    counts = {
        "seq_len": (seq_len, 1),
        "num_heads": (num_heads, 1),
        "num_kv_heads": (kv_heads, 1),
        "head_dim": (head_dim, 1),
        "first_segment_length": (first_segment_length, 1),
        "growth": (growth, 2),
    }
    if memory_budget is not None:
        counts["memory_budget"] = (memory_budget, 1)
    for name, (value, least) in counts.items():
        _check_count(name, value, least)
    largest_rate = num_heads if keep_every_position else None
    smallest: int | None = None
    for w0 in _halvings(first_segment_length):
        segments = _ladder(seq_len, w0, growth, largest_rate)
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


def _check_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; it must be an integer.")
    if value < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}.")


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


class DynamicDilatedAttention(nn.Module):
    """Dilated attention whose branches `select_segments` chooses for the length of each call.

    It has no parameters, makes no modules, and looks at nothing but shapes and dtypes, so equal
    inputs have equal results on every machine.

    Args:
        first_segment_length: w₀, in positions, as in `select_segments`.
        growth: Ratio of neighbouring branches' lengths and rates, as there.
        keep_every_position: Whether rates stop at the number of heads, as there.
        memory_budget: Bytes of the keys and values that one query may see, as there.
        head_offsets: `"interleaved"` or `"blocked"`, see `DilatedPattern`.
        padding: `"masked"` or `"attended"`, see `DilatedPattern`.
        scale: Factor of the scores; 1/√head_dim if None.
        dropout: Probability of dropping each attention probability in training mode.
        max_workspace_bytes: Limit of temporary memory, see `dilated_attention`.
        backend: `"auto"` or the name of a backend.

    Raises:
        TypeError, ValueError: As `select_segments` and `DilatedAttention` do.

    Example:
        >>> attention = DynamicDilatedAttention(first_segment_length=16)
        >>> q = k = v = torch.randn(1, 50, 4, 8)
        >>> attention(q, k, v, is_causal=True).shape
        torch.Size([1, 50, 4, 8])
        >>> attention.pattern_for(q, k).branches[-1]
        Branch(segment_length=64, dilation_rate=4)
    """

    def __init__(
        self,
        *,
        first_segment_length: int = 2048,
        growth: int = 2,
        keep_every_position: bool = False,
        memory_budget: int | None = None,
        head_offsets: HeadOffsets = "interleaved",
        padding: Padding = "masked",
        scale: float | None = None,
        dropout: float = 0.0,
        max_workspace_bytes: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        # Checks both groups of options now rather than at the first call.
        select_segments(1, 1, first_segment_length=first_segment_length, growth=growth)
        if memory_budget is not None:
            _check_count("memory_budget", memory_budget, 1)
        config = DilatedAttentionConfig(
            head_offsets=head_offsets,
            padding=padding,
            scale=scale,
            dropout=dropout,
            max_workspace_bytes=max_workspace_bytes,
            backend=backend,
        )
        self.first_segment_length, self.growth = first_segment_length, growth
        self.keep_every_position, self.memory_budget = keep_every_position, memory_budget
        self.head_offsets: HeadOffsets = config.head_offsets
        self.padding: Padding = config.padding
        self.max_workspace_bytes = config.max_workspace_bytes
        self.scale, self.dropout, self.backend = config.scale, config.dropout, config.backend

    def pattern_for(self, q: torch.Tensor, k: torch.Tensor) -> DilatedPattern:
        """The pattern that a call with q `(B, S, H, D)` and k `(B, S, H_kv, D)` uses."""
        for name, x in (("q", q), ("k", k)):
            if x.dim() != 4:
                raise ValueError(
                    f"{name} has shape {tuple(x.shape)}; it must have the four dimensions "
                    f"(batch, sequence, heads, head_dim)."
                )
        segments = select_segments(
            max(1, q.shape[1]),
            max(1, q.shape[2]),
            num_kv_heads=max(1, k.shape[2]),
            head_dim=max(1, k.shape[3]),
            dtype=k.dtype,
            first_segment_length=self.first_segment_length,
            growth=self.growth,
            keep_every_position=self.keep_every_position,
            memory_budget=self.memory_budget,
        )
        return DilatedPattern(*segments, head_offsets=self.head_offsets, padding=self.padding)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, S, H, D)` q, `(B, S, H_kv, D)` k, v -> `(B, S, H, D)`; see `dilated_attention`.

        There is no `cu_seqlens`: each document of a packed batch has a length of its own, and one
        choice for all would give it another result than it has alone.
        """
        return dilated_attention(
            q,
            k,
            v,
            self.pattern_for(q, k),
            is_causal=is_causal,
            scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
            key_padding_mask=key_padding_mask,
            max_workspace_bytes=self.max_workspace_bytes,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        """The options that differ from their defaults, for `repr`."""
        parts = [f"first_segment_length={self.first_segment_length}, growth={self.growth}"]
        defaults = {"keep_every_position": False, "memory_budget": None, "scale": None}
        defaults |= {"head_offsets": "interleaved", "padding": "masked", "dropout": 0.0}
        defaults |= {"max_workspace_bytes": None, "backend": "auto"}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)!r}")
        return ", ".join(parts)
