"""Which positions each rank of a group holds, and the agreement of the ranks on it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from dilated_core import Span
from dilated_core.checks import check_choice, check_integer, check_number, check_tensor

from dilated_ring.layout import LAYOUTS, Layout, num_positions, spans_of_ranks
from dilated_ring.sharding.group import RankGroup
from dilated_ring.transport import (
    DisagreementError,
    DistributedTransport,
    check_agreement,
    reporting_failures,
)


@dataclass(frozen=True, slots=True)
class Shards:
    """How one dimension of a tensor is spread over ranks.

    Attributes:
        dim: The dimension of the sequence, counted from the front.
        spans: Spans of global positions of each rank, by rank.
        rank: Which of the ranks this process is.
        transport: Between the ranks; None: there is only one.
    """

    dim: int
    spans: tuple[tuple[Span, ...], ...]
    rank: int
    transport: DistributedTransport | None

    @property
    def own(self) -> tuple[Span, ...]:
        """The spans of this rank."""
        return self.spans[self.rank]

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


def transport_of(ranks: RankGroup, timeout_s: float | None) -> DistributedTransport | None:
    """The transport between ranks; None for a group of one.

    Raises:
        TypeError: If `timeout_s` is neither None nor a number.
        ValueError: If `timeout_s` is not above 0.
    """
    if timeout_s is not None:
        timeout_s = check_number("timeout_s", timeout_s, above=0)
    if ranks.process_group is None:
        return None
    return DistributedTransport(ranks.process_group, timeout_s=timeout_s)


@contextmanager
def reporting(transport: DistributedTransport | None) -> Generator[None]:
    """`reporting_failures`, which a group of one does without."""
    if transport is None:
        yield
    else:
        with reporting_failures(transport, *transport.hosted):
            yield


def shards_of(
    dim: int,
    layout: Layout,
    seq_len: int,
    ranks: RankGroup,
    transport: DistributedTransport | None = None,
) -> Shards:
    """The shards of a sequence of known length.

    Raises:
        TypeError: If `seq_len` is not an integer.
        ValueError: If the layout is unknown or `seq_len` is negative.
    """
    check_choice("layout", layout, LAYOUTS)
    seq_len = check_integer("seq_len", seq_len, at_least=0)
    return Shards(dim, spans_of_ranks(layout, seq_len, ranks.size), ranks.rank, transport)


def agree_on_shards(
    x_local: torch.Tensor,
    dim: int,
    layout: Layout,
    ranks: RankGroup,
    seq_len: int | None,
    transport: DistributedTransport | None,
    **others: object,
) -> Shards:
    """The shards that `x_local` is one of.

    Args:
        x_local: The shard of this rank.
        dim: Of the sequence, counted from the front.
        layout: Of the shards.
        ranks: Their holders.
        seq_len: S; None: the ranks exchange their lengths, and compare everything else.
        transport: Between the ranks, from `transport_of`.
        **others: Further arguments that must be equal on all ranks.

    Raises:
        TypeError: If `seq_len` is no integer.
        ValueError: If the layout is unknown or the shard does not fit the layout.
        DisagreementError: The same on all ranks, if a shard does not fit the layout or arguments
            differ between ranks.
    """
    length = x_local.shape[dim]
    if seq_len is not None or transport is None:
        seq_len = length if seq_len is None else seq_len
        shards = shards_of(dim, layout, seq_len, ranks, transport)
        if text := _misfit(length, shards, ranks.rank, layout):
            raise ValueError(text)
        return shards
    sizes = [*x_local.shape[:dim], "any", *x_local.shape[dim + 1 :]]
    given = {
        "shape": f"({', '.join(map(str, sizes))})",
        "dtype": x_local.dtype,
        "dim": dim,
        "layout": layout,
        **others,
    }
    lengths = check_agreement(transport, ranks.rank, _as_texts(given), length)
    shards = shards_of(dim, layout, sum(lengths), ranks, transport)
    for rank, length in enumerate(lengths):
        if text := _misfit(length, shards, rank, layout):
            raise DisagreementError(text)
    return shards


def _as_texts(given: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in given.items()}


def _misfit(length: int, shards: Shards, rank: int, layout: Layout) -> str:
    """Why a shard of this length is none of the layout; empty if it is one."""
    lengths = shards.lengths
    if length == lengths[rank]:
        return ""
    return (
        f"x_local has {length} positions on rank {rank} of the group; in the {layout} layout of "
        f"{sum(lengths)} positions over {len(lengths)} ranks, rank {rank} holds {lengths[rank]}, "
        f"so cut the sequence with shard_sequence."
    )
