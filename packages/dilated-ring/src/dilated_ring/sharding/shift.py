"""Shift a sharded sequence: each position gets the value a fixed distance away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from dilated_core import Span
from dilated_core.checks import check_integer
from dilated_core.inputs import check_cu_seqlens, read_document_bounds

from dilated_ring.layout import Layout
from dilated_ring.sharding.collectives import exchange
from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.sharding.positions import positions_of
from dilated_ring.sharding.shards import (
    Shards,
    agree_on_shards,
    check_dim,
    reporting,
    transport_of,
)
from dilated_ring.uncompiled import uncompiled


@uncompiled
def shift_sequence(
    x_local: torch.Tensor,
    shift: int,
    *,
    fill: float,
    dim: int = 1,
    group: Group = None,
    layout: Layout = "contiguous",
    cu_seqlens: torch.Tensor | None = None,
    seq_len: int | None = None,
    timeout_s: float | None = None,
) -> torch.Tensor:
    """The value `shift` positions further on, for each position of a sharded sequence.

    Example::

        labels_local = shift_sequence(tokens_local, 1, fill=-100, group=mesh)

    y[i] = x[i + shift] in global positions, whichever rank holds i + shift, and `fill` where
    i + shift is outside of the sequence or of the document of i. Only rows that change ranks
    travel: at most |shift| for each border between shards. Differentiable.

    Args:
        x_local: Shards as `shard_sequence` cuts them, of any dtype.
        shift: Any integer; 1 gives labels from tokens, -1 gives each position its predecessor.
        fill: For positions without a value, such as -100 for labels.
        dim: Dimension of the sequence.
        group: As in `shard_sequence`.
        layout: As in `shard_sequence`.
        cu_seqlens: `(documents + 1,)`, int32 or int64: where documents begin, in global positions;
            the same on every rank. None: one document.
        seq_len: As in `unshard_sequence`. On NCCL, the ranks must have used the group before.
        timeout_s: As in `unshard_sequence`.

    Returns:
        A contiguous tensor of the shape of x_local.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, `fill` is no value of x_local's dtype,
            `cu_seqlens` does not end at S, or for the reasons of `unshard_sequence`.
        RankFailure: If another rank failed or did not answer.
    """
    dim = check_dim(x_local, dim, "x_local")
    shift = check_integer("shift", shift)
    _check_fill(fill, x_local.dtype)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
    ranks = resolve_group(group)
    transport = transport_of(ranks, timeout_s)
    with reporting(transport):
        shards = agree_on_shards(
            x_local, dim, layout, ranks, seq_len, transport,
            shift=shift, fill=fill, cu_seqlens=_summary(cu_seqlens),
        )  # fmt: skip
        bounds = None
        if cu_seqlens is not None:
            bounds = read_document_bounds(cu_seqlens, sum(shards.lengths), "the sequence")
            bounds = bounds.to(x_local.device)
        call = _Shift(shift, fill, shards, bounds)
        return _ShiftFunction.apply(x_local, call)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class _Shift:
    """One call of `shift_sequence`, checked."""

    shift: int
    fill: float
    shards: Shards
    bounds: torch.Tensor | None


class _ShiftFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, call: _Shift) -> torch.Tensor:
        ctx.call = call
        return _shifted(x, call)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        back = replace(ctx.call, shift=-ctx.call.shift, fill=0)
        with reporting(back.shards.transport):
            return _ShiftFunction.apply(*grads, back), None


class _Copy(NamedTuple):
    """Rows that go from one rank to one rank: where they lie at the one and at the other."""

    source: slice
    target: slice

    @property
    def length(self) -> int:
        return self.target.stop - self.target.start


def _copies(source: tuple[Span, ...], target: tuple[Span, ...], shift: int) -> list[_Copy]:
    """What the holder of the spans `source` has for the holder of the spans `target`."""
    found: list[_Copy] = []
    for goal, goal_begin in _with_local_begins(target):
        for given, given_begin in _with_local_begins(source):
            # Positions i of goal whose i + shift lies in given.
            start = max(goal.start, given.start - shift)
            length = min(goal.stop, given.stop - shift) - start
            if length > 0:
                at = given_begin + start + shift - given.start
                to = goal_begin + start - goal.start
                found.append(_Copy(slice(at, at + length), slice(to, to + length)))
    return found


def _with_local_begins(spans: tuple[Span, ...]) -> Iterator[tuple[Span, int]]:
    return zip(spans, accumulate((span.length for span in spans), initial=0), strict=False)


def _shifted(x: torch.Tensor, call: _Shift) -> torch.Tensor:
    own, dim = call.shards.own, call.shards.dim
    rows = x.movedim(dim, 0)
    y = torch.full_like(x, call.fill, memory_format=torch.contiguous_format)
    into = y.movedim(dim, 0)
    _copy_from_others(rows, into, call)
    for copy in _copies(own, own, call.shift):
        into[copy.target] = rows[copy.source]
    if call.bounds is not None:
        positions = positions_of(own, x.device)
        here, there = (
            torch.searchsorted(call.bounds, i, right=True)
            for i in (positions, positions + call.shift)
        )
        into[here != there] = call.fill
    return y


def _copy_from_others(rows: torch.Tensor, into: torch.Tensor, call: _Shift) -> None:
    shards = call.shards
    sends: dict[int, torch.Tensor] = {}
    receives: dict[int, torch.Tensor] = {}
    coming: dict[int, list[_Copy]] = {}
    for peer, spans in enumerate(shards.spans):
        if peer == shards.rank:
            continue
        if leaving := _copies(shards.own, spans, call.shift):
            sends[peer] = torch.cat([rows[copy.source] for copy in leaving])
        if copies := _copies(spans, shards.own, call.shift):
            coming[peer] = copies
            count = sum(copy.length for copy in copies)
            receives[peer] = rows.new_empty(count, *rows.shape[1:])
    exchange(shards, sends, receives, step=f"shift of a sequence by {call.shift}")
    for peer, copies in coming.items():
        begin = 0
        for copy in copies:
            into[copy.target] = receives[peer][begin : begin + copy.length]
            begin += copy.length


def _summary(cu_seqlens: torch.Tensor | None) -> str:
    if cu_seqlens is None:
        return "None"
    # Python hashes integers alike in every process.
    return f"{len(cu_seqlens)} entries with hash {hash(tuple(map(int, cu_seqlens)))}"


def _check_fill(fill: float, dtype: torch.dtype) -> None:
    if isinstance(fill, bool) != (dtype == torch.bool) or not isinstance(fill, (int, float)):
        raise TypeError(
            f"fill is {fill!r} and x_local has dtype {dtype}; fill must be a number, or for a bool "
            f"tensor True or False."
        )
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    if not limits.min <= fill <= limits.max or fill != int(fill):
        raise ValueError(
            f"fill is {fill} and x_local has dtype {dtype}; fill must be an integer from "
            f"{limits.min} to {limits.max}, or convert x_local first."
        )
