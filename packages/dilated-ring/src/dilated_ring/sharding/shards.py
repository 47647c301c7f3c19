"""Which positions each rank of a group holds, and the agreement of the ranks on it."""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

import torch
from dilated_core import Span
from dilated_core.checks import check_choice, check_integer, check_tensor

from dilated_ring.layout import LAYOUTS, Layout, num_positions, spans_of_ranks
from dilated_ring.sharding.group import RankGroup
from dilated_ring.transport import DistributedTransport


@dataclass(frozen=True, slots=True)
class Shards:
    """How one dimension of a tensor is spread over ranks.

    Attributes:
        dim: The dimension of the sequence, counted from the front.
        spans: Spans of global positions of each rank, by rank.
        ranks: The ranks, and which of them this process is.
    """

    dim: int
    spans: tuple[tuple[Span, ...], ...]
    ranks: RankGroup

    @property
    def own(self) -> tuple[Span, ...]:
        """The spans of this rank."""
        return self.spans[self.ranks.rank]

    @property
    def lengths(self) -> list[int]:
        """How many positions each rank holds."""
        return [num_positions(spans) for spans in self.spans]


def check_dim(x: torch.Tensor, dim: int, name: str) -> int:
    """`dim` counted from the front.

    Raises:
        TypeError: If x is no tensor or `dim` no integer.
        ValueError: If x has no such dimension.
    """
    check_tensor(name, x)
    if not x.dim():
        raise ValueError(f"{name} has no dimension; it must have one for the sequence.")
    return check_integer("dim", dim, at_least=-x.dim(), at_most=x.dim() - 1) % x.dim()


def shards_of(dim: int, layout: Layout, seq_len: int, ranks: RankGroup) -> Shards:
    """The shards of a sequence of known length.

    Raises:
        TypeError: If `seq_len` is not an integer.
        ValueError: If the layout is unknown or `seq_len` is negative.
    """
    check_choice("layout", layout, LAYOUTS)
    seq_len = check_integer("seq_len", seq_len, at_least=0)
    return Shards(dim, spans_of_ranks(layout, seq_len, ranks.size), ranks)


def agree_on_shards(
    x_local: torch.Tensor, dim: int, layout: Layout, ranks: RankGroup, seq_len: int | None
) -> Shards:
    """The shards that `x_local` is one of.

    Args:
        x_local: The shard of this rank.
        dim: Of the sequence, counted from the front.
        layout: Of the shards.
        ranks: Their holders.
        seq_len: S; None: the ranks exchange their lengths, and all raise the same error.

    Raises:
        TypeError: If `seq_len` is no integer.
        ValueError: If the layout is unknown, a shard does not fit the layout, or shapes or dtypes
            differ between ranks.
    """
    length = x_local.shape[dim]
    if seq_len is not None:
        shards = shards_of(dim, layout, seq_len, ranks)
        _check_length(length, shards, ranks.rank, layout)
        return shards
    lengths = _exchange_lengths(x_local, dim, ranks) if ranks.process_group else [length]
    shards = shards_of(dim, layout, sum(lengths), ranks)
    for rank, length in enumerate(lengths):
        _check_length(length, shards, rank, layout)
    return shards


def _exchange_lengths(x_local: torch.Tensor, dim: int, ranks: RankGroup) -> list[int]:
    row = (dim, x_local.shape[:dim], x_local.shape[dim + 1 :], x_local.dtype)
    mine = torch.tensor([x_local.shape[dim], crc32(repr(row).encode())], device="cpu")
    everyone = DistributedTransport(ranks.process_group).all_gather(ranks.rank, mine)
    lengths, rows = torch.stack(everyone).unbind(1)
    if others := [str(rank) for rank in range(ranks.size) if rows[rank] != rows[0]]:
        raise ValueError(
            f"x_local differs between rank 0 and rank {', '.join(others)} of the group: on rank "
            f"{ranks.rank} it has shape {tuple(x_local.shape)}, dtype {x_local.dtype} and dim "
            f"{dim}; all but the length of the sequence must be equal on all ranks."
        )
    return [int(length) for length in lengths]


def _check_length(length: int, shards: Shards, rank: int, layout: Layout) -> None:
    lengths = shards.lengths
    if length != lengths[rank]:
        raise ValueError(
            f"x_local has {length} positions on rank {rank} of the group; in the {layout} layout "
            f"of {sum(lengths)} positions over {len(lengths)} ranks, rank {rank} holds "
            f"{lengths[rank]}, so cut the sequence with shard_sequence."
        )
