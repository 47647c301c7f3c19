"""Build ring attention by name, and the names that the factories of dilated-core find."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import Any

from dilated_core import AttentionVariant
from dilated_core.checks import check_choice

from dilated_ring.modules.config import RingAttentionConfig
from dilated_ring.modules.multihead import RING_KINDS, RingMultiheadDilatedAttention
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
            `HilbertRingAttention`, which works in tiles. All have the same values.
        config: Options as an object, which is not changed; None: the defaults.
        group: The ranks that share the sequence, see `ring_dilated_attention`.
        **options: Options of `RingAttentionConfig` as keywords. They override the object.

    Raises:
        ValueError: If the name is unknown, or as `StandardRingAttention` does.
        TypeError: If an option is unknown, or the config is of another class.

    Example:
        >>> create_ring_attention("standard", segment_lengths=[64, 128], dilation_rates=[1, 2])
        StandardRingAttention(segment_lengths=[64, 128], dilation_rates=[1, 2])
    """
    check_choice("kind", kind, tuple(RING_KINDS))
    config = RingAttentionConfig() if config is None else config
    if not isinstance(config, RingAttentionConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a RingAttentionConfig, and single "
            f"options can be given as keywords instead."
        )
    settings = {field.name: getattr(config, field.name) for field in fields(config)}
    return RING_KINDS[kind](RingAttentionConfig(**(settings | options)), group=group)


def _variant(kind: str) -> AttentionVariant:
    def multihead(**options: Any) -> RingMultiheadDilatedAttention:
        return RingMultiheadDilatedAttention(kind=kind, **options)

    return AttentionVariant(partial(create_ring_attention, kind), multihead)


standard, distributed, hilbert = (_variant(kind) for kind in ("standard", "distributed", "hilbert"))
