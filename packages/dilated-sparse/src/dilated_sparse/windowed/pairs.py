"""How many pairs of a query and a key that it sees are in a window and its branches."""

from __future__ import annotations

from collections import Counter

from dilated_core import DilatedPattern
from dilated_core.pattern.branches import head_offset, kept_rows

from dilated_sparse.windowed.plan import Overlap


def windowed_pairs(
    pattern: DilatedPattern | None,
    window: int,
    seq_len: int,
    num_heads: int,
    *,
    is_causal: bool,
    overlap: Overlap = "once",
    head_range: tuple[int, int] | None = None,
) -> int:
    """Pairs of all heads, which FLOP counters count.

    Args:
        pattern: The branches; None: the window alone.
        window: W, at least 1.
        seq_len: S.
        num_heads: H.
        is_causal: Whether query i sees only the keys j ≤ i.
        overlap: Whether a pair of the window counts again in the branches.
        head_range: (first, total), if the heads are some of `total`.

    Example:
        >>> windowed_pairs(DilatedPattern([8], [2]), 3, 8, 1, is_causal=True)
        24
    """
    near = min(window, seq_len)
    # Query i sees min(i + 1, W) keys up to itself, and as many behind it, without itself.
    before = seq_len * near - near * (near - 1) // 2
    total = num_heads * (before if is_causal else 2 * before - seq_len)
    if pattern is None:
        return total
    first, of = head_range or (0, num_heads)
    for w, r in pattern.branches:
        # Rows of a branch are r positions apart, so rows this far apart are out of the window.
        lag = -(-window // r) if overlap == "once" else 0
        segments, tail = divmod(seq_len, w)
        offsets = Counter(
            head_offset(first + head, r, of, pattern.head_offsets) for head in range(num_heads)
        )
        for offset, heads in offsets.items():
            for times, length in ((segments, w), (1, tail)):
                rows = kept_rows(length, r, offset)
                older = max(0, rows - lag) * (max(0, rows - lag) + 1) // 2
                both = older if is_causal else 2 * older - (rows if lag == 0 else 0)
                total += heads * times * both
    return total
