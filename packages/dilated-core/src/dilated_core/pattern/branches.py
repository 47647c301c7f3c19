"""Which positions each head keeps: `Branch`, `DilatedPattern` and the rows they select.

Everything here is arithmetic on Python integers; no tensor is touched except in
`DilatedPattern.materialize`, which exists for tests and plots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import torch

from dilated_core.checks import (
    answers_names,
    check_bool,
    check_choice,
    check_head_range,
    check_integer,
    is_listed,
)

HeadOffsets = Literal["interleaved", "blocked"]
Padding = Literal["masked", "attended"]


class Branch(NamedTuple):
    """One (w, r) pair of the paper.

    Attributes:
        segment_length: w, the number of positions a segment spans.
        dilation_rate: r, the interval between kept positions of a segment.
    """

    segment_length: int
    dilation_rate: int


def head_offset(head: int, rate: int, num_heads: int, head_offsets: HeadOffsets) -> int:
    """Position inside a segment at which `head` starts, for a branch of dilation `rate`.

    `"interleaved"` is the paper's s_j = j mod r (arXiv 2307.02486, section 2.3); `"blocked"` gives
    runs of ⌈H/r⌉ neighbouring heads one offset, as the published code and weights do.
    """
    if head_offsets == "interleaved":
        return head % rate
    return head // -(-num_heads // rate)


def kept_rows(length: int, rate: int, offset: int) -> int:
    """Number of positions ≡ offset (mod rate) among the `length` positions of a segment."""
    return max(0, -(-(length - offset) // rate))


@answers_names(
    dict.fromkeys(
        ("is_causal", "scale", "dropout_p", "key_padding_mask", "cu_seqlens"),
        "is passed to dilated_attention",
    )
)
@dataclass(frozen=True, slots=True)
class DilatedPattern:
    """The branches of a dilated attention, and how heads and paddings are treated.

    Immutable and hashable, so it can key a cache and be a constant of a compiled graph.

    Args:
        segment_lengths: w of each branch, in positions. A w beyond the sequence is clipped to it.
        dilation_rates: r of each branch, in positions; r need not divide w.
        head_offsets: `"interleaved"` (head h starts at h mod r, the paper) or `"blocked"` (runs of
            ⌈H/r⌉ heads share an offset, the published code and its weights).
        padding: `"masked"` (a short last segment has fewer keys) or `"attended"` (zero keys and
            zero values fill it and every segment's remainder, and non-causal queries attend to
            them, as in the published code).

    Raises:
        TypeError: If a length or a rate is not an integer, or an argument is unknown.
        ValueError: If the lists are empty, differ in length or hold a value below 1, or if an
            option is unknown.

    Example:
        >>> pattern = DilatedPattern([4, 8], [1, 2])
        >>> pattern.branches
        (Branch(segment_length=4, dilation_rate=1), Branch(segment_length=8, dilation_rate=2))
        >>> pattern.materialize(seq_len=8, num_heads=2)[1, 5]  # head 1 keeps odd positions twice
        tensor([0, 1, 0, 1, 1, 2, 1, 2])
    """

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    _: KW_ONLY
    head_offsets: HeadOffsets = "interleaved"
    padding: Padding = "masked"

    def __post_init__(self) -> None:
        lengths = _positive_integers("segment_lengths", self.segment_lengths)
        rates = _positive_integers("dilation_rates", self.dilation_rates)
        if len(lengths) != len(rates):
            raise ValueError(
                f"segment_lengths has {len(lengths)} entries and dilation_rates {len(rates)}; "
                f"each branch is one (segment length, dilation rate) pair, so give lists of equal "
                f"length."
            )
        check_choice("head_offsets", self.head_offsets, get_args(HeadOffsets))
        check_choice("padding", self.padding, get_args(Padding))
        object.__setattr__(self, "segment_lengths", lengths)
        object.__setattr__(self, "dilation_rates", rates)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The (segment_length, dilation_rate) pairs, in the order given."""
        return tuple(map(Branch, self.segment_lengths, self.dilation_rates))

    def materialize(self, seq_len: int, num_heads: int, *, is_causal: bool = False) -> torch.Tensor:
        """Dense key counts: how often each query sees each key. For tests and plots.

        Args:
            seq_len: S, in positions.
            num_heads: H.
            is_causal: Drop the keys behind each query.

        Returns:
            int64 `(H, S, S)` on the CPU; entry `[h, i, j]` is the number of branches that let query
            i of head h see key j. Zero keys of `padding="attended"` have no position, hence no
            entry.

        Raises:
            TypeError: If a size is no integer or `is_causal` no bool.
            ValueError: If a size is negative.
        """
        seq_len = check_integer("seq_len", seq_len, at_least=0)
        num_heads = check_integer("num_heads", num_heads, at_least=0)
        check_bool("is_causal", is_causal)
        counts = torch.zeros(num_heads, seq_len, seq_len, dtype=torch.int64, device="cpu")
        for w, r in clip_pattern(self, seq_len, num_heads).branches:
            for head in range(num_heads):
                offset = head_offset(head, r, num_heads, self.head_offsets)
                for start in range(0, seq_len, w):
                    # A short segment may end before the offset: then it keeps nothing.
                    kept = slice(start + offset, min(start + w, seq_len), r)
                    counts[head, kept, kept] += 1
        return counts.tril_() if is_causal else counts

    def keys_per_query(self, seq_len: int) -> float:
        """Mean number of keys of a query, over positions and over one full cycle of heads.

        Keys are counted with multiplicity and without causality; the paper's Σ w/r² (eq. 17) where
        everything divides evenly.

        Args:
            seq_len: S, in positions; at least 1.
        """
        seq_len = check_integer("seq_len", seq_len, at_least=1)
        pairs = Fraction(0)
        for w, r in self.branches:
            segments, tail = divmod(seq_len, w)
            total = segments * _pairs_of_all_offsets(w, r) + _pairs_of_all_offsets(tail, r)
            pairs += Fraction(total, r)
        return float(pairs / seq_len)

    def flops(
        self,
        seq_len: int,
        num_heads: int,
        head_dim: int,
        *,
        batch_size: int = 1,
        is_causal: bool = False,
        backward: bool = False,
        head_range: tuple[int, int] | None = None,
    ) -> int:
        """Floating-point operations of the matrix products, as attention papers count them.

        Forward is 4·D per query-key pair (q·k and p·v, a multiply and an add each); backward is
        2.5 times that (five products instead of two).

        Args:
            seq_len: S, in positions.
            num_heads: H.
            head_dim: D.
            batch_size: B.
            is_causal: Count only the pairs that causality leaves.
            backward: Count the backward pass instead of the forward pass.
            head_range: (first, total), if the heads are those from `first` on of `total`.

        Raises:
            TypeError: If a size is no integer, or `is_causal` or `backward` no bool.
            ValueError: If a size is negative, `num_heads` below 1, or `head_range` does not fit.
        """
        seq_len = check_integer("seq_len", seq_len, at_least=0)
        num_heads = check_integer("num_heads", num_heads, at_least=1)
        head_dim = check_integer("head_dim", head_dim, at_least=0)
        batch_size = check_integer("batch_size", batch_size, at_least=0)
        check_bool("is_causal", is_causal)
        check_bool("backward", backward)
        first, total = check_head_range(head_range, num_heads)
        pairs = sum(
            self._pairs(
                branch,
                head_offset(first + head, branch.dilation_rate, total, self.head_offsets),
                seq_len,
                is_causal=is_causal,
            )
            for branch in self.branches
            for head in range(num_heads)
        )
        return batch_size * pairs * head_dim * (10 if backward else 4)

    @staticmethod
    def _pairs(branch: Branch, offset: int, seq_len: int, *, is_causal: bool) -> int:
        """Query-key pairs of one head of one branch."""
        w, r = branch
        segments, tail = divmod(seq_len, w)
        total = 0
        for times, length in ((segments, w), (1, tail)):
            rows = kept_rows(length, r, offset)
            total += times * (rows * (rows + 1) // 2 if is_causal else rows * rows)
        return total


def _pairs_of_all_offsets(length: int, rate: int) -> int:
    """Query-key pairs in `length` positions of a segment, summed over the offsets 0 to r − 1.

    With length = q·r + m, m offsets keep q + 1 positions and the others q.
    """
    q, m = divmod(length, rate)
    return m * (q + 1) ** 2 + (rate - m) * q**2


def clip_pattern(pattern: DilatedPattern, seq_len: int, num_heads: int) -> DilatedPattern:
    """The pattern with the same result on S positions and H heads, and no needlessly large number.

    A segment longer than the sequence is the sequence. A rate of at least w and H keeps, of each
    segment, the position at the head's offset or nothing, and so does a rate of max(w, H). Behind
    this, lengths and rates fit the 64-bit integers of strides and of tensors.

    Args:
        pattern: The branches.
        seq_len: S.
        num_heads: H; of the whole, where only some heads are at hand.
    """
    lengths = [max(1, min(w, seq_len)) for w in pattern.segment_lengths]
    rates = [
        min(r, max(w, num_heads)) for w, r in zip(lengths, pattern.dilation_rates, strict=True)
    ]
    return replace(pattern, segment_lengths=lengths, dilation_rates=rates)


def check_pattern(pattern: object) -> None:
    """Refuse what is no DilatedPattern.

    Raises:
        TypeError: If it is anything else.
    """
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}; it must be a DilatedPattern, such as "
            f"DilatedPattern([2048, 4096], [1, 2])."
        )


def _positive_integers(name: str, values: Sequence[int]) -> tuple[int, ...]:
    if isinstance(values, bytes) or not is_listed(values):
        raise TypeError(f"{name} is {values!r}; give a list of integers, such as [2048, 4096].")
    checked = [check_integer(f"{name}[{i}]", value, at_least=1) for i, value in enumerate(values)]
    if not checked:
        raise ValueError(f"{name} is empty; a pattern needs at least one branch.")
    return tuple(checked)
