"""The kinds of ring attention by name."""

from __future__ import annotations

from dataclasses import fields

from dilated_ring.modules.block_sparse import RingBlockSparseAttention
from dilated_ring.modules.config import RingAttentionConfig, RingBlockSparseConfig
from dilated_ring.modules.ring import (
    DistributedRingAttention,
    HilbertRingAttention,
    StandardRingAttention,
)
from dilated_ring.sharding.group import Group

RING_KINDS: dict[str, type[StandardRingAttention]] = {
    "auto": StandardRingAttention,
    "standard": StandardRingAttention,
    "distributed": DistributedRingAttention,
    "hilbert": HilbertRingAttention,
    "block_sparse": RingBlockSparseAttention,
}


def config_of_kind(
    kind: str, config: RingAttentionConfig, **options: object
) -> RingAttentionConfig:
    """The config with these options, of the class that this kind is built from.

    Raises:
        TypeError: If an option is unknown, or the config has options that the kind has not.
    """
    expected = RingBlockSparseConfig if kind == "block_sparse" else RingAttentionConfig
    if not isinstance(config, RingAttentionConfig) or (  # pyright: ignore[reportUnnecessaryIsInstance]
        isinstance(config, RingBlockSparseConfig) and expected is RingAttentionConfig
    ):
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a {expected.__name__}, and single "
            f"options can be given as keywords instead."
        )
    settings: dict[str, object] = {
        field.name: getattr(config, field.name) for field in fields(config)
    }
    return expected(**(settings | options))  # pyright: ignore[reportArgumentType]


def ring_of_kind(
    kind: str, config: RingAttentionConfig, group: Group | tuple[Group, Group]
) -> StandardRingAttention:
    """The module of a kind, one of `RING_KINDS`."""
    return RING_KINDS[kind](config_of_kind(kind, config), group=group)
