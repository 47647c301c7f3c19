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
from dilated_ring.plan.blocks import (
    DEFAULT_BLOCK_SIZE,
    BlocksForLength,
    KeptBlocks,
    checked_blocks,
)
from dilated_ring.plan.covering import CoveringBlocks
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


@answers_names(RING_ARGUMENTS)
@dataclass(frozen=True, kw_only=True)
class RingBlockSparseConfig(RingAttentionConfig):
    """What `RingBlockSparseAttention` is built from.

    The other options are those of `RingAttentionConfig`; `tile_size` must be None and `padding`
    `"masked"`.

    Attributes:
        block_pattern: The kept blocks, for sequences of one length; or what builds them for every
            length, such as a `dilated_sparse.SparsePatternConfig`. None: all blocks that the
            branches, `segment_lengths` and `dilation_rates`, touch; otherwise there must be no
            branches.
        block_size: Positions of a block, see `ring_block_sparse_attention`.

    Raises:
        TypeError, ValueError: As for `RingAttentionConfig`.
    """

    block_pattern: KeptBlocks | BlocksForLength | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        RingAttentionConfig.__post_init__(self)
        if self.tile_size is not None:
            raise ValueError(
                f"tile_size is {self.tile_size}; a pattern of blocks has tiles of its own, so "
                f"leave it out."
            )
        if self.padding != "masked":
            raise ValueError(
                f"padding is {self.padding!r}; block-sparse attention has no zero keys, so leave "
                f"it out."
            )
        if self.block_size is not None:
            check_integer("block_size", self.block_size, at_least=1)
        if self.block_pattern is None:
            return
        checked_blocks(self.block_pattern, self.block_size)
        for name in ("segment_lengths", "dilation_rates", "head_offsets"):
            default = DilatedAttentionConfig.__dataclass_fields__[name].default
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name} is {value!r} and block_pattern is given, which alone determines the "
                    f"blocks; leave out one of the two."
                )

    def blocks_of(self, num_heads: int) -> KeptBlocks | BlocksForLength:
        """The pattern of a call with this many heads."""
        if self.block_pattern is not None:
            return self.block_pattern
        total = num_heads if self.head_range is None else self.head_range[1]
        return CoveringBlocks(self.pattern, total, self.block_size or DEFAULT_BLOCK_SIZE)

    def call_options(self, *, is_training: bool) -> dict[str, Any]:
        """Keyword arguments of `ring_block_sparse_attention`, beside pattern and group."""
        options = super().call_options(is_training=is_training)
        del options["tile_size"]
        return options | {"block_size": self.block_size}


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


@dataclass(frozen=True)
class RingBlockSparseArguments(RingBlockSparseConfig):
    """The signature of `RingBlockSparseAttention`: the pattern comes first."""

    block_pattern: KeptBlocks | BlocksForLength | None = None
    block_size: int | None = None
    _: KW_ONLY
    group: Group | tuple[Group, Group] = None


@dataclass(frozen=True)
class RingBlockSparseMultiheadArguments(RingBlockSparseConfig, MultiheadConfig):
    """The signature of `RingBlockSparseMultiheadAttention`."""

    embed_dim: int = field()
    num_heads: int = field()
    _: KW_ONLY
    group: Group | tuple[Group, Group] = None
