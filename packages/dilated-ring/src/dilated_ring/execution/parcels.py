"""Pack rows of k and v into parcels and messages, and gradients of parcels back into rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch
from dilated_core import DilatedPattern, Gradients

from dilated_ring.plan.exchange import Exchange
from dilated_ring.plan.parcels import Parcel, kept_of_part

KeysAndValues = tuple[torch.Tensor, torch.Tensor]
"""k and v of a parcel, each `(B, rows, pairs, D)`; or their gradients."""


def pack(exchange: Exchange, parcel: Parcel, k: torch.Tensor, v: torch.Tensor) -> KeysAndValues:
    """The rows of a parcel, from the tensors `(B, L, H_kv, D)` of its owner."""
    packed = zeros_of(exchange, parcel, k, k.dtype)
    _pack_rows_(packed[0], exchange, parcel, k, None)
    _pack_rows_(packed[1], exchange, parcel, v, None)
    return packed


def pack_rows(
    exchange: Exchange, parcel: Parcel, x: torch.Tensor, *, at: int | None = None
) -> torch.Tensor:
    """`(B, rows, pairs, …)` from `(B, L, H_kv, …)`.

    `at`: Index in x of the first position of the sequence; None: x is the owner's tensor.
    """
    packed = x.new_zeros(x.shape[0], parcel.num_rows, parcel.num_pairs, *x.shape[3:])
    _pack_rows_(packed, exchange, parcel, x, at)
    return packed


def _pack_rows_(
    packed: torch.Tensor, exchange: Exchange, parcel: Parcel, x: torch.Tensor, at: int | None
) -> None:
    x = x[:, _rows_of(exchange, parcel, at)]
    for patch in _patches(exchange, parcel):
        packed[:, patch.to_rows, patch.pairs] = x[:, patch.rows, patch.kv_heads]


def add_packed_(
    exchange: Exchange, parcel: Parcel, dk: torch.Tensor, dv: torch.Tensor, grads: KeysAndValues
) -> None:
    """Add the gradients of a parcel to the gradients `(B, L, H_kv, D)` of its owner, in place."""
    rows = _rows_of(exchange, parcel, None)
    for into, grad in zip((dk[:, rows], dv[:, rows]), grads, strict=True):
        for patch in _patches(exchange, parcel):
            into[:, patch.rows, patch.kv_heads] += grad[:, patch.to_rows, patch.pairs]


def join(parcels: Iterable[KeysAndValues]) -> torch.Tensor:
    """One flat tensor of several parcels; of a single one, a view.

    A dense ring passes on as many rows as a rank holds, and a copy would be another shard.
    """
    pairs = list(parcels)
    if len(pairs) == 1:
        k, v = pairs[0]
        # zeros_of and split make such pairs.
        if v.storage_offset() == k.storage_offset() + k.numel() and _share_storage(k, v):
            return k.as_strided((2 * k.numel(),), (1,))
    return torch.cat([x.reshape(-1) for pair in pairs for x in pair])


def _share_storage(k: torch.Tensor, v: torch.Tensor) -> bool:
    storages = k.untyped_storage(), v.untyped_storage()
    return storages[0].data_ptr() == storages[1].data_ptr() and k.is_contiguous()


def split(
    message: torch.Tensor, exchange: Exchange, numbers: Iterable[int], batch_size: int, D: int
) -> dict[int, KeysAndValues]:
    """The parcels of a flat tensor, as views, by number."""
    parcels: dict[int, KeysAndValues] = {}
    begin = 0
    for number in numbers:
        parcel = exchange.parcels[number]
        shape = (batch_size, parcel.num_rows, parcel.num_pairs, D)
        end = begin + 2 * prod(shape)
        k, v = message[begin:end].view(2, *shape)
        parcels[number] = k, v
        begin = end
    return parcels


def message_length(exchange: Exchange, numbers: Iterable[int], batch_size: int, D: int) -> int:
    """Elements of a message with these parcels."""
    return sum(batch_size * D * exchange.parcels[n].num_rows_of_head_dim for n in numbers)


def zeros_of(
    exchange: Exchange, parcel: Parcel, like: torch.Tensor, dtype: torch.dtype
) -> KeysAndValues:
    """Zeros of a parcel of k and v, or of its gradients: two halves of one tensor."""
    shape = (2, like.shape[0], parcel.num_rows, parcel.num_pairs, like.shape[3])
    first, second = like.new_zeros(shape, dtype=dtype)
    return first, second


def add_(grads: Gradients | KeysAndValues, others: KeysAndValues) -> None:
    """Add the gradients of k and v."""
    grads[-2].add_(others[0])
    grads[-1].add_(others[1])


class _Patch(NamedTuple):
    """Rows of a parcel that one slice takes.

    Attributes:
        rows, kv_heads: Of the positions of the parcel.
        to_rows, pairs: Of the packed tensors.
    """

    rows: slice
    kv_heads: slice | list[int]
    to_rows: slice
    pairs: slice | list[int]


def _patches(exchange: Exchange, parcel: Parcel) -> Iterator[_Patch]:
    pattern = exchange.pattern
    if not isinstance(pattern, DilatedPattern):
        at = 0
        for start, stop in parcel.spans:
            begin, end = start - parcel.positions.start, stop - parcel.positions.start
            rows, to_rows = slice(begin, end), slice(at, at + stop - start)
            yield _Patch(rows, _index(parcel.kv_heads), to_rows, slice(None))
            at += stop - start
        return
    seq_len, rate = (
        exchange.sequences[parcel.sequence].seq_len,
        pattern.dilation_rates[parcel.branch],
    )
    for lane, first, num_rows in kept_of_part(
        pattern, parcel.branch, seq_len, parcel.positions, exchange.heads
    ):
        if num_rows:
            rows = slice(first, first + (num_rows - 1) * rate + 1, rate)
            yield _Patch(rows, _index(lane.kv_heads), slice(0, num_rows), _index(lane.pairs))


def _rows_of(exchange: Exchange, parcel: Parcel, at: int | None) -> slice:
    """Where the positions of a parcel are in a tensor."""
    if at is None:
        piece = exchange.sequences[parcel.sequence].pieces[parcel.owner][parcel.piece]
        at = piece.at - piece.span.start
    return slice(at + parcel.positions.start, at + parcel.positions.stop)


def _index(numbers: tuple[int, ...]) -> slice | list[int]:
    """Ascending numbers as a slice where they have one step, so that nothing is copied."""
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) <= 1:
        return slice(numbers[0], numbers[-1] + 1, *steps)
    return list(numbers)
