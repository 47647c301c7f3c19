"""Cut a sequence into the shards of a layout, and put shards together."""

from __future__ import annotations

import torch

from dilated_ring.layout import Layout
from dilated_ring.sharding.collectives import cut, gather
from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.sharding.shards import (
    agree_on_shards,
    check_dim,
    reporting,
    shards_of,
    transport_of,
)
from dilated_ring.uncompiled import uncompiled


@uncompiled
def shard_sequence(
    x: torch.Tensor,
    dim: int = 1,
    *,
    group: Group = None,
    layout: Layout = "contiguous",
    timeout_s: float | None = None,
) -> torch.Tensor:
    """This rank's part of a tensor that every rank holds.

    Example::

        tokens_local = shard_sequence(tokens, group=mesh, layout="zigzag")

    Exchanges nothing in forward. In backward every rank gets the whole gradient of x: each rank's
    gradient of its part, gathered. Parameters that computed x, such as an embedding, then have
    their whole gradient on every rank: average it over the ranks where other gradients are added,
    or shard the tokens instead of the embeddings, and all gradients are added alike.

    Args:
        x: Of any dtype, the same on every rank.
        dim: Dimension of the sequence, of any length: parts differ by at most one position
            ("zigzag": two), and a rank may hold nothing.
        group: The ranks that share the sequence: a ProcessGroup, a DeviceMesh with a dimension "cp"
            or with one dimension, or None for the default group; see `resolve_group`.
        layout: "contiguous": rank i holds the i-th part. "zigzag": of twice as many parts, the i-th
            from the front and the i-th from the back, so that under causality all ranks have about
            equally much to do.
        timeout_s: Seconds that backward waits for another rank, see
            `dilated_ring.transport.DistributedTransport`.

    Returns:
        A contiguous copy of the rank's positions, in ascending order, so that x can be released.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `dim` or `layout` is none of x, or this process is not in the group.
    """
    dim = check_dim(x, dim, "x")
    ranks = resolve_group(group)
    return cut(x, shards_of(dim, layout, x.shape[dim], ranks, transport_of(ranks, timeout_s)))


@uncompiled
def unshard_sequence(
    x_local: torch.Tensor,
    dim: int = 1,
    *,
    group: Group = None,
    layout: Layout = "contiguous",
    seq_len: int | None = None,
    timeout_s: float | None = None,
) -> torch.Tensor:
    """The whole sequence on every rank, from the shards of all.

    Example::

        out = unshard_sequence(out_local, group=mesh, layout="zigzag")

    Differentiable. The loss is the sum of the losses that the ranks compute from the result: with
    the same loss on 4 ranks, `x_local.grad` is 4 times the gradient of one loss, so divide the loss
    by the number of ranks, or compute it on one rank and add `0 * out.sum()` on the others. Every
    rank must run backward.

    Args:
        x_local: Shards as `shard_sequence` cuts them: equal dtypes and, but for `dim`, shapes.
        dim: Dimension of the sequence.
        group: As in `shard_sequence`.
        layout: As in `shard_sequence`.
        seq_len: S, if known: ranks then neither exchange their lengths nor compare their arguments.
            A wrong length then raises on its own rank, and `RankFailure` on the others.
        timeout_s: Seconds that a rank waits for another one, see
            `dilated_ring.transport.DistributedTransport`.

    Returns:
        A contiguous tensor of S positions in global order.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `dim` or `layout` is none of x_local, this process is not in the group, a
            rank's number of positions does not fit the layout, or arguments, shapes or dtypes
            differ between ranks; then on every rank.
        RankFailure: If another rank failed or did not answer.
    """
    dim = check_dim(x_local, dim, "x_local")
    ranks = resolve_group(group)
    transport = transport_of(ranks, timeout_s)
    with reporting(transport):
        shards = agree_on_shards(x_local, dim, layout, ranks, seq_len, transport)
        return gather(x_local, shards)
