"""Attention of a shard of the sequence as modules without parameters."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, Never, Self

import torch
import torch.distributed as dist
from dilated_core import DilatedAttention
from dilated_core.modules.options import check_forward_names, from_options

from dilated_ring.attention import ring_dilated_attention, simulated_ring_attention
from dilated_ring.modules.config import RING_ARGUMENTS, RingArguments, RingAttentionConfig
from dilated_ring.modules.health import check_health
from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.uncompiled import uncompiled

_DEFAULT_TILE_SIZE = 2048

logger = logging.getLogger(__name__)


class StandardRingAttention(DilatedAttention):
    """`ring_dilated_attention` with its pattern and options as a module without parameters.

    Each rank calls it with the positions that it holds, as `shard_sequence` cuts them, and gets the
    results of these positions. All ranks of the group make the same calls in the same order.

    Without torch.distributed, `ring_size` ranks run one after another in this process, on the whole
    sequence: the result is the same, and nothing is saved. The first call says so, at level INFO of
    the logger `dilated_ring`.

    Args:
        config: A `RingAttentionConfig`. Or, instead of it, its options by name, which that class
            explains; `segment_lengths` and `dilation_rates` are required and may be positional.
        group: The ranks that share the sequence, see `ring_dilated_attention`. A copy of the module
            shares it, and a pickle refuses it, since no other process has it.

    Raises:
        TypeError, ValueError: As `RingAttentionConfig` does; or if `ring_size` is not the size of
            the group. If torch.distributed is initialised later, the first call raises this.

    Example:
        >>> ring = StandardRingAttention([8, 32], [1, 4], ring_size=4)
        >>> q = k = v = torch.randn(1, 64, 4, 16)
        >>> ring(q, k, v, is_causal=True).shape
        torch.Size([1, 64, 4, 16])
        >>> ring.extra_repr()
        'segment_lengths=[8, 32], dilation_rates=[1, 4], ring_size=4, in one process'
    """

    _config_defaults: ClassVar[Mapping[str, Any]] = {}

    @from_options(RingArguments, elsewhere=RING_ARGUMENTS, config=RingAttentionConfig)
    def __init__(  # pyright: ignore[reportIncompatibleVariableOverride] - it has more options
        self, config: RingAttentionConfig, *, group: Group | tuple[Group, Group] = None
    ) -> None:
        defaults = self._config_defaults.items()
        unset = {name: value for name, value in defaults if getattr(config, name) is None}
        config = replace(config, **unset)
        super().__init__(config)
        self.config: RingAttentionConfig = config
        self.group = group
        if group is not None or _is_distributed():
            self._simulated_size()

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        seq_len: int | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """`(B, L, H, D)` q, `(B, L, H_kv, D)` k, v -> `(B, L, H, D)`; see `ring_dilated_attention`.

        Raises:
            TypeError, ValueError: As `ring_dilated_attention`.
            FloatingPointError: With `check_health`, on all ranks, if a value of one is not finite.
        """
        check_forward_names(self, unknown, RING_ARGUMENTS, self.config)
        options: dict[str, Any] = {
            "is_causal": is_causal,
            "key_padding_mask": key_padding_mask,
            "cu_seqlens": cu_seqlens,
            **self.config.call_options(is_training=self.training),
        }
        if not self.config.check_health:
            return self._attend(q, k, v, seq_len, options)
        where = self.group, self.config.timeout_s
        check_health({"q": q, "k": k, "v": v}, *where, key_padding_mask=key_padding_mask)
        out = self._attend(q, k, v, seq_len, options)
        check_health({"the output": out}, *where)
        return out

    @uncompiled
    def _attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seq_len: int | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        """Over the group, or in this process."""
        ring_size = self._simulated_size()
        if ring_size is None:
            where = {"group": self.group, "seq_len": seq_len, "timeout_s": self.config.timeout_s}
            return self._over_ranks(q, k, v, **where, **options)
        _log_simulation(ring_size)
        if seq_len not in (None, q.shape[-3]):
            raise ValueError(
                f"seq_len is {seq_len} and q has {q.shape[-3]} positions; in one process these are "
                f"all positions, so leave out seq_len."
            )
        return self._in_process(q, k, v, ring_size=ring_size, **options)

    def _over_ranks(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        return ring_dilated_attention(q, k, v, self.pattern, **options)

    def _in_process(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any
    ) -> torch.Tensor:
        return simulated_ring_attention(q, k, v, self.pattern, **options)

    def extra_repr(self) -> str:
        """The branches and the options that differ from their defaults, for `repr`."""
        shown = super().extra_repr()
        return f"{shown}, in one process" if self._is_simulated() else shown

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A group is a connection: a copy of the module uses the same one.
        memo[id(self.group)] = self.group
        copy = self.__class__.__new__(self.__class__)
        memo[id(self)] = copy
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy

    def __getstate__(self) -> dict[str, Any]:
        if self.group is not None:
            raise TypeError(
                f"{type(self).__name__} has a process group, which exists only here and cannot be "
                f"pickled; save the state_dict, or build the module without group."
            )
        return self.__dict__.copy()

    def _is_simulated(self) -> bool:
        size = self.config.ring_size
        is_alone = not _is_distributed() or dist.get_world_size() == 1
        return size is not None and size > 1 and self.group is None and is_alone

    def _simulated_size(self) -> int | None:
        """How many ranks run in this process; None: the ring is that of the group.

        Raises:
            ValueError: If `ring_size` is not the size of the group.
        """
        size = self.config.ring_size
        if self._is_simulated():
            return size
        levels = self.group if isinstance(self.group, tuple) else (self.group,)
        ranks = prod(resolve_group(group).size for group in levels)
        if size is not None and size != ranks:
            raise ValueError(
                f"ring_size is {size} and the group has {ranks} rank{'s' if ranks > 1 else ''}; "
                f"leave out ring_size, or pass a group of that size."
            )
        return None


class DistributedRingAttention(StandardRingAttention):
    """`StandardRingAttention` with checks that raise on all ranks, and hooks for engines.

    Checks: before and after attention, ranks exchange how many values of q, k, v and of the output
    are not finite (two small messages for each pair of ranks). If there is one, every rank raises
    the same FloatingPointError with the rank that has it, instead of one rank spreading NaN to all.
    Masked keys may hold anything. Whatever `seq_len` is, lengths and arguments are compared at
    every call, so a rank with another pattern, dtype or shape is an error of all ranks, not a hang.
    `check_health=False` switches off the first, not the second.

    Hooks: the ring is a module with local tensors in and out, so a training engine (FSDP,
    DeepSpeed, a monitor) uses those of `nn.Module`:

    - `register_forward_pre_hook`: the local q, k and v, before anything is sent.
    - `register_forward_hook`: the local output, after all messages of forward.
    - `register_full_backward_pre_hook`: its gradient, before rows travel again.
    - `register_full_backward_hook`: the gradients of local q, k and v, complete: the shares of all
      ranks have come home.

    Hooks run on every rank. One that communicates must do so on all ranks of its group, and one
    that raises must raise on all; a rank that leaves a call makes the others raise `RankFailure`.

    Args, errors: As for `StandardRingAttention`.

    Example:
        >>> ring = DistributedRingAttention([8, 32], [1, 4])
        >>> q = k = v = torch.full((1, 40, 4, 16), torch.inf)
        >>> ring(q, k, v)
        Traceback (most recent call last):
        FloatingPointError: q is not finite in 2560 places on rank 0; k is not finite in ...
    """

    _config_defaults: ClassVar[Mapping[str, Any]] = {"check_health": True}

    # Without seq_len, which would leave out the comparison.
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        is_causal: bool = False,
        *,
        key_padding_mask: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
        **unknown: Never,
    ) -> torch.Tensor:
        """As of `StandardRingAttention`, but without `seq_len`: ranks compare arguments always."""
        check_forward_names(self, unknown, RING_ARGUMENTS.keys() - {"seq_len"}, self.config)
        return super().forward(
            q, k, v, is_causal, key_padding_mask=key_padding_mask, cu_seqlens=cu_seqlens
        )


class HilbertRingAttention(StandardRingAttention):
    """`StandardRingAttention` that works in tiles, along a Hilbert curve through them.

    A tile is `tile_size` queries (2,048 by default) with `tile_size` keys, or with the rows of
    another rank's shard. On the curve each tile has its queries or its keys in common with the one
    before, and close ones are computed close in time; tiles that causality or the pattern empties
    are skipped. The order is that of the work alone: no token moves, causality is that of the
    positions, and every value is that of `StandardRingAttention` up to rounding, since partial
    results merge in any order. Documents that one rank holds as a whole are not cut.

    It can pay where a tile's queries and keys stay in a cache that the shard does not fit, and
    kernels see no order of their own. It also costs: more and smaller calls, and one merge for
    each. On CPUs it has not been measured to pay, so the standard order is the default everywhere.

    Args, errors: As for `StandardRingAttention`. `exchange="all_to_all"` is refused, as it has no
    tiles, and `"auto"` does not choose it.

    Example:
        >>> q, k, v = torch.randn(3, 1, 64, 4, 16).unbind()
        >>> tiles = HilbertRingAttention([8, 32], [1, 4], tile_size=16)(q, k, v, is_causal=True)
        >>> whole = StandardRingAttention([8, 32], [1, 4])(q, k, v, is_causal=True)
        >>> torch.allclose(tiles, whole, atol=1e-6)
        True
    """

    _config_defaults: ClassVar[Mapping[str, Any]] = {"tile_size": _DEFAULT_TILE_SIZE}


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


@lru_cache
def _log_simulation(ring_size: int) -> None:
    """Once per size, not once per layer and call."""
    logger.info(
        "ring_size is %d and there is one process: its ranks run one after another in it, on the "
        "whole sequence. The result is exact; memory and time are those of one device.",
        ring_size,
    )
