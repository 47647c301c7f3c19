"""Which keys one query sees, as arithmetic on integers: no tensor, any length of sequence."""

from __future__ import annotations

from typing import NamedTuple

from dilated_core.checks import check_bool, check_integer
from dilated_core.pattern.branches import (
    DilatedPattern,
    check_pattern,
    head_offset,
    kept_rows,
)


class VisibleKeys(NamedTuple):
    """The keys that one query of one head sees.

    Attributes:
        positions: For each branch of the pattern, in its order, the positions it selects,
            ascending; empty where the branch does not keep the query. A position that several
            branches select counts once for each.
        zero_keys: Zero keys that the query sees beside them; 0 unless the pattern has
            `padding="attended"` and the query is not causal.
    """

    positions: tuple[range, ...]
    zero_keys: int


def visible_keys(
    pattern: DilatedPattern,
    position: int,
    head: int,
    *,
    num_heads: int,
    seq_len: int,
    is_causal: bool = False,
) -> VisibleKeys:
    """The keys that the query at `position` sees in `head`, by the definition of dilated attention.

    A branch (w, r) keeps the positions of a segment whose index in it is ≡ offset(head) (mod r),
    and kept positions see one another (arXiv 2307.02486, eq. 2–8 for one head, section 2.3 for the
    offsets of heads). Costs a few integer operations per branch.

    Args:
        pattern: The branches.
        position: Position of the query, in [0, `seq_len`).
        head: Head of the query, in [0, `num_heads`).
        num_heads: H.
        seq_len: S, in positions.
        is_causal: The query sees only the keys at its own position and before.

    Returns:
        A range of positions per branch, and the number of zero keys.

    Raises:
        TypeError: If `pattern` is no DilatedPattern, a number no integer, or `is_causal` no bool.
        ValueError: If `position` or `head` is out of range.

    Example:
        >>> pattern = DilatedPattern([4, 8], [1, 2])
        >>> visible_keys(pattern, 13, 1, num_heads=2, seq_len=10**9, is_causal=True)
        VisibleKeys(positions=(range(12, 14), range(9, 14, 2)), zero_keys=0)
    """
    check_pattern(pattern)
    seq_len, num_heads = check_integer("seq_len", seq_len), check_integer("num_heads", num_heads)
    position, head = check_integer("position", position), check_integer("head", head)
    check_bool("is_causal", is_causal)
    for name, value, limit_name, limit in (
        ("position", position, "seq_len", seq_len),
        ("head", head, "num_heads", num_heads),
    ):
        if not 0 <= value < limit:
            raise ValueError(f"{name} is {value}; it must be in [0, {limit_name}), here {limit}.")
    return unchecked_visible_keys(pattern, position, head, num_heads, seq_len, is_causal=is_causal)


def unchecked_visible_keys(
    pattern: DilatedPattern,
    position: int,
    head: int,
    num_heads: int,
    seq_len: int,
    *,
    is_causal: bool,
) -> VisibleKeys:
    """`visible_keys` for callers that have checked their arguments."""
    positions: list[range] = []
    zero_keys = 0
    for w, r in pattern.branches:
        w = min(w, seq_len)
        offset = head_offset(head, r, num_heads, pattern.head_offsets)
        index = position % w
        if index % r != offset:
            positions.append(range(0))
            continue
        start = position - index
        keys = range(start + offset, min(start + w, seq_len), r)
        if is_causal:
            keys = range(keys.start, position + 1, r)
        elif pattern.padding == "attended":
            # Not len(keys), which fails above 2^63.
            zero_keys += -(-w // r) - kept_rows(min(w, seq_len - start), r, offset)
        positions.append(keys)
    return VisibleKeys(tuple(positions), zero_keys)
