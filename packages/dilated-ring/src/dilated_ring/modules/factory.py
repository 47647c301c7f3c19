"""Build ring attention by name, and the names that the factories of dilated-core find."""

from __future__ import annotations

from functools import partial
from typing import Any

from dilated_core import AttentionVariant
from dilated_core.checks import check_choice

from dilated_ring.modules.config import RingAttentionConfig
from dilated_ring.modules.kinds import RING_KINDS, config_of_kind, ring_of_kind
from dilated_ring.modules.multihead import (
    RingBlockSparseMultiheadAttention,
    RingMultiheadDilatedAttention,
)
from dilated_ring.modules.ring import StandardRingAttention
from dilated_ring.sharding.group import Group


def create_ring_attention(
    kind: str = "auto",
    *,
    config: RingAttentionConfig | None = None,
    group: Group | tuple[Group, Group] = None,
    **options: Any,
) -> StandardRingAttention:
    """Build attention of a shard of the sequence by name.

    Args:
        kind: `"standard"` or `"auto"`: `StandardRingAttention`. `"distributed"`:
            `DistributedRingAttention`, which also checks values. `"hilbert"`:
            `HilbertRingAttention`, which works in tiles. These have the same values.
            `"block_sparse"`: `RingBlockSparseAttention`, over the blocks of `block_pattern`, or
            over those that the branches touch.
        config: Options as an object, which is not changed; None: the defaults.
        group: The ranks that share the sequence, see `ring_dilated_attention`.
        **options: Options of `RingAttentionConfig`, for `"block_sparse"` of
            `RingBlockSparseConfig`, as keywords. They override the object.

    Raises:
        ValueError: If the name is unknown, or as `StandardRingAttention` does.
        TypeError: If an option is unknown, or the config is of another class.

    Example:
        >>> create_ring_attention("standard", segment_lengths=[64, 128], dilation_rates=[1, 2])
        StandardRingAttention(segment_lengths=[64, 128], dilation_rates=[1, 2])
    """
    check_choice("kind", kind, tuple(RING_KINDS))
    config = RingAttentionConfig() if config is None else config
    return ring_of_kind(kind, config_of_kind(kind, config, **options), group)


def _variant(kind: str) -> AttentionVariant:
    def multihead(**options: Any) -> RingMultiheadDilatedAttention:
        if kind == "block_sparse":
            return RingBlockSparseMultiheadAttention(**options)
        return RingMultiheadDilatedAttention(kind=kind, **options)

    return AttentionVariant(partial(create_ring_attention, kind), multihead)


standard, distributed, hilbert, block_sparse = (
    _variant(kind) for kind in ("standard", "distributed", "hilbert", "block_sparse")
)
