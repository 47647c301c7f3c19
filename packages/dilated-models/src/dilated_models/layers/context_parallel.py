"""One sequence over several ranks: what a model does on the shard of one rank.

Most of a model treats each position on its own. Three parts do not: attention, the convolution of
`key_conv`, and positions, which count from the beginning of the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from dilated_core import DilatedPattern
from dilated_core.checks import check_integer
from torch import Tensor

from dilated_models.attention_kinds import check_spreading

if TYPE_CHECKING:
    from dilated_ring import BlocksForLength, Layout
    from dilated_ring.plan.exchange import ExchangeKind
    from dilated_ring.sharding.group import Group


class Shard(NamedTuple):
    """The positions that one rank holds.

    Attributes:
        positions: `(L,)`, int64, of each local token in the whole sequence.
        seq_len: S, positions of all ranks together.
    """

    positions: Tensor
    seq_len: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextParallel:
    """How the sequence of a call of `LongNetLM` is spread over ranks; needs dilated-ring.

    Example::

        # On each rank, with the same tokens (B, S) on all of them.
        context_parallel = ContextParallel(group=mesh["cp"], layout="zigzag")
        local = shard_sequence(tokens, group=mesh["cp"], layout="zigzag")
        logits = model(local, context_parallel=context_parallel)  # of the local tokens

    Args:
        group: The ranks that share a sequence: a ProcessGroup, a DeviceMesh with a dimension "cp"
            or with one dimension, or None for all ranks. A pair (across, inside) of groups, as in
            `dilated_ring.ring_dilated_attention`: heads are exchanged for positions inside a node;
            tokens are cut over all ranks of the pair, in the order of the nodes.
        layout: Which positions each rank holds, `"contiguous"` or `"zigzag"`, as in
            `dilated_ring.shard_sequence`, which must have cut the tokens.
        exchange: As in `dilated_ring.ring_dilated_attention`.
        seq_len: S, if known. Ranks then neither exchange their lengths nor compare their arguments:
            after a mistake on one rank the others raise `RankFailure`, at the latest after
            `timeout_s`. None: they do both, once for each call of the model.
        timeout_s: As in `dilated_ring.ring_dilated_attention`.

    Raises:
        ImportError: If dilated-ring is not installed.
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range.
    """

    group: Group | tuple[Group, Group] = None
    layout: Layout = "contiguous"
    exchange: ExchangeKind = "auto"
    seq_len: int | None = None
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        check_spreading(self.layout, self.exchange, self.timeout_s)
        from dilated_ring.sharding.group import resolve_group, resolve_pair

        if isinstance(self.group, tuple):
            resolve_pair(self.group)
        else:
            resolve_group(self.group)
        if self.seq_len is not None:
            check_integer("seq_len", self.seq_len, at_least=0)

    @property
    def num_ranks(self) -> int:
        """How many ranks share a sequence."""
        from dilated_ring.sharding.group import resolve_group

        return resolve_group(self._all_ranks()).size

    def shard_of(self, tokens: Tensor) -> Shard:
        """Which positions `tokens`, `(…, L)`, are; the ranks exchange their lengths.

        Raises:
            ValueError: If `shard_sequence` with this group and layout did not cut them.
        """
        from dilated_ring.sharding.group import resolve_group
        from dilated_ring.sharding.positions import positions_of
        from dilated_ring.sharding.shards import agree_on_shards, transport_of

        ranks = resolve_group(self._all_ranks())
        shards = agree_on_shards(
            tokens,
            tokens.dim() - 1,
            self.layout,
            ranks,
            self.seq_len,
            transport_of(ranks, self.timeout_s),
        )
        return Shard(positions_of(shards.own, tokens.device), sum(shards.lengths))

    def _all_ranks(self) -> Group:
        """The ranks that share a sequence as one group."""
        from dilated_ring.sharding.group import group_of_pair

        return group_of_pair(self.group) if isinstance(self.group, tuple) else self.group

    def knowing(self, seq_len: int) -> ContextParallel:
        """The same, without the exchange of lengths."""
        return replace(self, seq_len=seq_len)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: DilatedPattern | BlocksForLength,
        *,
        is_causal: bool,
        cu_seqlens: Tensor | None,
        backend: str,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of local q to k and v of all ranks.

        See `ring_dilated_attention`, and for blocks `ring_block_sparse_attention`.
        """
        from dilated_ring import ring_block_sparse_attention, ring_dilated_attention

        is_dilated = isinstance(pattern, DilatedPattern)
        attend: Any = ring_dilated_attention if is_dilated else ring_block_sparse_attention
        return attend(
            q,
            k,
            v,
            pattern,
            group=self.group,
            is_causal=is_causal,
            layout=self.layout,
            exchange=self.exchange,
            cu_seqlens=cu_seqlens,
            seq_len=self.seq_len,
            scale=scale,
            backend=backend,
            timeout_s=self.timeout_s,
        )

    def rows_before(self, x: Tensor, lag: int, cu_seqlens: Tensor | None) -> Tensor:
        """Row t − lag of the whole sequence for each row t of `x`, `(…, L, E)`.

        Zeros where the sequence, or the document of t, has no such row.
        """
        from dilated_ring import shift_sequence

        return shift_sequence(
            x,
            -lag,
            fill=0,
            dim=x.dim() - 2,
            group=self._all_ranks(),
            layout=self.layout,
            cu_seqlens=cu_seqlens,
            seq_len=self.seq_len,
            timeout_s=self.timeout_s,
        )


class Ranks:
    """The group of a model. A copy of the model has the same group, which cannot be copied."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: object) -> Ranks:
        return self


def shard_of_call(tokens: Tensor, context_parallel: ContextParallel | None) -> Shard:
    """The positions of `tokens`, `(…, L)`: a shard, or without `context_parallel` all there are.

    Raises:
        TypeError: If `context_parallel` is anything else.
        ValueError: As for `ContextParallel.shard_of`.
    """
    if context_parallel is None:
        seq_len = tokens.shape[-1]
        return Shard(torch.arange(seq_len, device=tokens.device), seq_len)
    if not isinstance(context_parallel, ContextParallel):
        raise TypeError(
            f"context_parallel is a {type(context_parallel).__name__}; it must be a "
            f"ContextParallel, such as ContextParallel(group=...)."
        )
    return context_parallel.shard_of(tokens)
