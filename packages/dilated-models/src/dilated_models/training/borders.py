"""Borders of segments, behind which a query sees little of what comes just before it."""

from __future__ import annotations

import torch
from dilated_core import DilatedPattern
from torch import Tensor

_FEWEST_SHOWN = 0.25  # of the longest segment of rate 1


def distances_from_border(pattern: DilatedPattern, seq_len: int) -> Tensor | None:
    """How many tokens just before each query its branches of rate 1 show it.

    Returns:
        `(S,)` int64; None if every query sees all tokens before it in one such branch, or there is
        no such branch.

    Example:
        >>> distances_from_border(DilatedPattern([4, 8], [1, 2]), 10).tolist()
        [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    """
    undilated = [w for w, r in pattern.branches if r == 1]
    if not undilated or max(undilated) >= seq_len:
        return None
    queries = torch.arange(seq_len)
    return torch.stack([queries % w for w in undilated]).amax(0)


def border_note(pattern: DilatedPattern, seq_len: int) -> str | None:
    """A sentence about queries that are blind behind a border; None if there are none.

    A query is blind if its branches of rate 1 show it less than a quarter of their longest segment,
    though more tokens come before it.
    """
    distances = distances_from_border(pattern, seq_len)
    if distances is None:
        return None
    undilated = sorted(w for w, r in pattern.branches if r == 1)
    # In the first segment a query sees all tokens before it.
    worst = int(distances[undilated[0] :].min())
    if worst >= _FEWEST_SHOWN * undilated[-1]:
        return None
    return (
        f"behind each border of the segments of {undilated[-1]} tokens, queries see only dilated "
        f"keys of what comes before. A second branch of rate 1 with other borders, such as "
        f"{undilated[-1] * 3 // 2}/1, shows them the rest"
    )
