"""Check that all ranks that share a sequence have read the same batch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias, cast

import torch

from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.transport import DistributedTransport

Batch: TypeAlias = "torch.Tensor | Mapping[str, Batch] | Sequence[Batch] | int | float | str | None"


def check_same_batch(batch: Batch, group: Group = None) -> None:
    """Refuse a batch that is not the same on every rank of a group.

    >>> if step == 0:  # doctest: +SKIP
    ...     check_same_batch(batch, mesh)

    Ranks that share a sequence must cut the same batch. With another one on some ranks, as of a
    sampler that counts them as data parallel, training goes on with parts of unrelated sequences.
    Each rank sends a hash of 8 bytes, so call on the first step and after a restart. The hash
    covers values, shapes, dtypes and names, on whichever device tensors are.

    Args:
        batch: The whole batch, before it is sharded: a tensor, or dicts and lists of tensors,
            numbers, strings and None.
        group: The ranks that share a sequence, as in `shard_sequence`: with data parallelism
            beside, the dimension "cp" alone.

    Raises:
        TypeError: If the batch holds anything else, on this rank.
        ValueError: If the ranks hold different batches, on every rank.
    """
    digest = blake2b(digest_size=8)
    for part in _parts(batch, "batch"):
        digest.update(part)
    ranks = resolve_group(group)
    if ranks.process_group is None:
        return
    number = int.from_bytes(digest.digest(), "big", signed=True)
    mine = torch.tensor([number], dtype=torch.int64, device="cpu")
    everyone = DistributedTransport(ranks.process_group).all_gather(ranks.rank, mine)
    holders: dict[int, list[int]] = {}
    for rank, value in enumerate(everyone):
        holders.setdefault(int(value), []).append(rank)
    if len(holders) > 1:
        first, *others = (f"rank {', '.join(map(str, ranks))}" for ranks in holders.values())
        raise ValueError(
            f"batch is one on {first} of the group, another on {', another on '.join(others)}; "
            f"ranks that share a sequence must read the same batch, so give the sampler the number "
            f"of data-parallel ranks, not of all ranks."
        )


def _parts(value: Any, name: str) -> Iterator[bytes]:
    """What the hash covers, such that no two batches have the same bytes."""
    if isinstance(value, torch.Tensor):
        yield f"{name} tensor {tuple(value.shape)} {value.dtype};".encode()
        yield _bytes_of(value)
    elif isinstance(value, Mapping):
        items = sorted(cast("Mapping[Any, Any]", value).items(), key=lambda item: str(item[0]))
        yield f"{name} {len(items)} entries;".encode()
        for key, entry in items:
            yield from _parts(entry, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        entries = cast("Sequence[Any]", value)
        yield f"{name} {len(entries)} entries;".encode()
        for i, entry in enumerate(entries):
            yield from _parts(entry, f"{name}[{i}]")
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield f"{name} {value!r};".encode()
    else:
        raise TypeError(
            f"{name} is a {type(value).__name__}; a batch must hold tensors, numbers, strings and "
            f"None, in dicts, lists and tuples."
        )


def _bytes_of(x: torch.Tensor) -> bytes:
    x = x.detach().cpu().contiguous().resolve_conj().resolve_neg()
    # Not numpy, which has no bfloat16 and is not required.
    return ctypes.string_at(x.data_ptr(), x.numel() * x.element_size()) if x.numel() else b""
