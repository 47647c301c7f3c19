"""Global positions of the tokens that a rank holds."""

from __future__ import annotations

import torch
from dilated_core import Span
from dilated_core.checks import check_integer

from dilated_ring.layout import Layout
from dilated_ring.sharding.group import Group, RankGroup, resolve_group
from dilated_ring.sharding.shards import shards_of


def local_positions(
    layout: Layout,
    seq_len: int,
    group: Group | tuple[int, int] = None,
    *,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """The global position of each token that this rank holds.

    Args:
        layout: "contiguous" or "zigzag".
        seq_len: S, positions of all ranks together.
        group: The ranks that share the sequence, as in `shard_sequence`; or a pair (rank, size),
            which needs no torch.distributed.
        device: Of the result; None: the default device.

    Returns:
        Int64, one entry per local token, in the order in which `shard_sequence` keeps them.

    Example:
        >>> local_positions("zigzag", 8, (0, 2))
        tensor([0, 1, 6, 7])

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the layout is unknown, a number is out of range, or this process is not in
            the group.
    """
    ranks = _ranks_of_pair(group) if isinstance(group, tuple) else resolve_group(group)
    return positions_of(shards_of(0, layout, seq_len, ranks).own, device)


def positions_of(spans: tuple[Span, ...], device: torch.device | str | None = None) -> torch.Tensor:
    """The positions of spans, int64, in their order."""
    parts = [torch.arange(*span, device=device) for span in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def _ranks_of_pair(pair: tuple[int, ...]) -> RankGroup:
    if len(pair) != 2:
        raise ValueError(f"group is {pair}; a tuple must be (rank, size), such as (0, 4).")
    size = check_integer("the size in group", pair[1], at_least=1)
    rank = check_integer("the rank in group", pair[0], at_least=0, at_most=size - 1)
    return RankGroup(rank, size, None)
