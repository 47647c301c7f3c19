"""Options of the ring modules: those of dilated attention, and how it is spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from dilated_core import DilatedAttentionConfig, MultiheadConfig
from dilated_core.checks import (
    answers_names,
    check_bool,
    check_choice,
    check_integer,
    check_number,
)
from dilated_core.modules.config import FORWARD_ARGUMENTS

from dilated_ring.arguments import EXCHANGES, check_tile_size
from dilated_ring.layout import LAYOUTS, Layout
from dilated_ring.plan.exchange import ExchangeKind
from dilated_ring.sharding.group import Group

# What `check_names` answers to arguments that belong to calls.
RING_ARGUMENTS = FORWARD_ARGUMENTS | {"seq_len": "is passed to forward"}


@answers_names(RING_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class RingAttentionConfig(DilatedAttentionConfig):
    """What ring modules are built from; every option acts in each of them.

    The options not listed are those of `DilatedAttentionConfig`; of these `max_workspace_bytes`
    must be None, since what a rank allocates follows from its shard.

    Attributes:
        ring_size: How many ranks share the sequence. None: the size of the group. A number must be
            that size. If there is one process, and no group is passed to the module, so many ranks
            run in it one after another, with the same result.
        layout: Which positions each rank holds, see `ring_dilated_attention`.
        exchange: How rows travel, see `ring_dilated_attention`.
        timeout_s: Seconds that a rank waits for another one, see `ring_dilated_attention`.
        tile_size: Positions of a tile, if ranks work in tiles along a Hilbert curve, see
            `HilbertRingAttention`. None: that module's default, and no tiles in others.
        check_health: Whether all ranks raise if one has a value that is not finite, see
            `DistributedRingAttention`. None: in that module yes, in others no.

    Raises:
        TypeError: If a value has the wrong type, or an argument is unknown.
        ValueError: If a value is out of range, or two do not fit together.

    Example:
        >>> RingAttentionConfig(segment_lengths=[8, 32], dilation_rates=[1, 4], ring_size=4).layout
        'contiguous'
    """

    ring_size: int | None = None
    layout: Layout = "contiguous"
    exchange: ExchangeKind = "auto"
    timeout_s: float | None = None
    tile_size: int | None = None
    check_health: bool | None = None

    def __post_init__(self) -> None:
        DilatedAttentionConfig.__post_init__(self)
        if self.max_workspace_bytes is not None:
            raise ValueError(
                f"max_workspace_bytes is {self.max_workspace_bytes}; a ring has no such limit, so "
                f"leave it out and spread the sequence over more ranks, or use DilatedAttention."
            )
        if self.ring_size is not None:
            check_integer("ring_size", self.ring_size, at_least=1)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("exchange", self.exchange, EXCHANGES)
        if self.timeout_s is not None:
            check_number("timeout_s", self.timeout_s, above=0, fix=", or None for the default")
        check_tile_size(self.tile_size, self.exchange)
        if self.check_health is not None:
            check_bool("check_health", self.check_health)

    def call_options(self, *, is_training: bool) -> dict[str, Any]:
        """Keyword arguments of `ring_dilated_attention`, beside the pattern and the group."""
        options = super().call_options(is_training=is_training)
        del options["max_workspace_bytes"]
        return options | {
            "layout": self.layout,
            "exchange": self.exchange,
            "tile_size": self.tile_size,
        }


@dataclass(frozen=True)
class RingArguments(RingAttentionConfig):
    """The signature of the ring modules: the branches come first and are required."""

    segment_lengths: Sequence[int] = field()
    dilation_rates: Sequence[int] = field()
    _: KW_ONLY
    group: Group | tuple[Group, Group] = None


@dataclass(frozen=True)
class RingMultiheadArguments(RingAttentionConfig, MultiheadConfig):
    """The signature of `RingMultiheadDilatedAttention`."""

    embed_dim: int = field()
    num_heads: int = field()
    _: KW_ONLY
    segment_lengths: Sequence[int] = field()
    dilation_rates: Sequence[int] = field()
    kind: str = "auto"
    group: Group | tuple[Group, Group] = None
