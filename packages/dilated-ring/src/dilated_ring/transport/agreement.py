"""Before messages go out: every rank passes the same arguments, or every rank raises."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b

import torch

from dilated_ring.transport.contract import Transport
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.errors import DisagreementError


def check_agreement(
    transport: Transport, rank: int, description: Mapping[str, str], local_len: int
) -> list[int]:
    """Compare the arguments of a call over all ranks, and collect the lengths of the shards.

    Each pair of ranks exchanges 16 bytes. Only where arguments differ, ranks exchange them.

    Example::

        lengths = check_agreement(transport, rank, {"dtype": "torch.float32"}, q.shape[1])

    Args:
        transport: With one rank per process.
        rank: This rank.
        description: Arguments that must be equal on all ranks, by name, as text.
        local_len: Length of the shard of this rank. It may differ between ranks.

    Returns:
        The length of the shard of each rank.

    Raises:
        DisagreementError: If arguments differ: a ValueError with the same text on every rank, which
            names the arguments, their values and the ranks that passed them.
        RankFailure: If a rank has failed, or does not come in time.
    """
    text = json.dumps(dict(description)).encode()
    digest = int.from_bytes(blake2b(text, digest_size=8).digest(), "little", signed=True)
    gathered = transport.all_gather(rank, torch.tensor([digest, local_len], device="cpu"))
    if any(int(value[0]) != digest for value in gathered):
        names = list(range(transport.size))
        if isinstance(transport, DistributedTransport):
            names = transport.watch.ranks
        texts = _gather_texts(transport, rank, text)
        raise DisagreementError(_disagreement([json.loads(each) for each in texts], names))
    return [int(value[1]) for value in gathered]


def _gather_texts(transport: Transport, rank: int, text: bytes) -> list[bytes]:
    sizes = [int(n) for n in transport.all_gather(rank, torch.tensor([len(text)], device="cpu"))]
    padded = torch.tensor(list(text.ljust(max(sizes))), dtype=torch.uint8, device="cpu")
    gathered = transport.all_gather(rank, padded)
    return [bytes(map(int, t))[:n] for t, n in zip(gathered, sizes, strict=True)]


def _disagreement(descriptions: Sequence[Mapping[str, str]], names: Sequence[int]) -> str:
    fields = dict.fromkeys(field for description in descriptions for field in description)
    differences: list[str] = []
    # A rank with wrong arguments describes nothing else.
    has_mistake = len({description.get("arguments") for description in descriptions}) > 1
    for field in fields:
        if has_mistake and any(field not in description for description in descriptions):
            continue
        ranks_by_value: dict[str, list[int]] = {}
        for name, description in zip(names, descriptions, strict=True):
            ranks_by_value.setdefault(description.get(field, "nothing"), []).append(name)
        if len(ranks_by_value) > 1:
            values = "; ".join(
                f"{value} on {'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"
                for value, ranks in ranks_by_value.items()
            )
            differences.append(f"{field} is {values}")
    return f"The ranks of the group differ: {'. '.join(differences)}. Pass the same on all ranks."
