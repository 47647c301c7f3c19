"""Check that all ranks that share a sequence have read the same batch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias, cast

import torch

from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.sharding.shards import reporting, transport_of
from dilated_ring.transport import DisagreementError, check_agreement
from dilated_ring.uncompiled import uncompiled

Batch: TypeAlias = "torch.Tensor | Mapping[str, Batch] | Sequence[Batch] | int | float | str | None"


@uncompiled
def check_same_batch(batch: Batch, group: Group = None, *, timeout_s: float | None = None) -> None:
    """Refuse a batch that is not the same on every rank of a group.

    Example::

        if step == 0:
            check_same_batch(batch, mesh)

    Ranks that share a sequence must cut the same batch. With another one on some ranks, as of a
    sampler that counts them as data parallel, training goes on with parts of unrelated sequences.
    Each rank sends a hash of 8 bytes, and details only where the hashes differ. The hash covers
    values, shapes, dtypes and names, on whichever device tensors are. Call on the first step and
    after a restart.

    Args:
        batch: The whole batch, before it is sharded: a tensor, or dicts and lists of tensors,
            numbers, strings and None.
        group: The ranks that share a sequence, as in `shard_sequence`: with data parallelism
            beside, the dimension "cp" alone.
        timeout_s: Seconds that a rank waits for another one, see
            `dilated_ring.transport.DistributedTransport`.

    Raises:
        TypeError: If the batch holds anything else, on this rank.
        ValueError: If the ranks hold different batches: the same on every rank, with the names of
            the entries and of the ranks that differ.
        RankFailure: If another rank failed or did not answer.
    """
    ranks = resolve_group(group)
    transport = transport_of(ranks, timeout_s)
    with reporting(transport):
        entries = dict(_entries(batch, "batch"))
        if transport is None:
            return
        try:
            check_agreement(transport, ranks.rank, entries, 0)
        except DisagreementError as error:
            raise DisagreementError(
                f"{error} Ranks that share a sequence must read the same batch, so give the "
                f"sampler the number of data-parallel ranks, not of all ranks."
            ) from None


def _entries(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Name and description of each entry, such that different batches differ in one."""
    if isinstance(value, torch.Tensor):
        digest = blake2b(_bytes_of(value), digest_size=8).hexdigest()
        yield name, f"{value.dtype} {tuple(value.shape)} with hash {digest}"
    elif isinstance(value, Mapping):
        entries = sorted(cast("Mapping[Any, Any]", value).items(), key=lambda item: str(item[0]))
        yield name, f"a dict of {len(entries)}"
        for key, entry in entries:
            yield from _entries(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        yield name, f"a list of {len(cast('Sequence[Any]', value))}"
        for i, entry in enumerate(cast("Sequence[Any]", value)):
            yield from _entries(entry, f"{name}[{i}]")
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield name, repr(value)
    else:
        raise TypeError(
            f"{name} is a {type(value).__name__}; a batch must hold tensors, numbers, strings and "
            f"None, in dicts, lists and tuples."
        )


def _bytes_of(x: torch.Tensor) -> bytes:
    x = x.detach().cpu().contiguous().resolve_conj().resolve_neg()
    # Not numpy, which has no bfloat16 and is not required.
    return ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()) if x.numel() else b""
