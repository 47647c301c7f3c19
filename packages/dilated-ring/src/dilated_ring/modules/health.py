"""Values that are not finite, found on all ranks at once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
import torch.distributed as dist

from dilated_ring.sharding.group import Group, resolve_group
from dilated_ring.transport.distributed import DistributedTransport
from dilated_ring.transport.faults import reporting_failures
from dilated_ring.uncompiled import uncompiled


@uncompiled
def check_health(
    tensors: Mapping[str, torch.Tensor],
    group: Group | tuple[Group, Group],
    timeout_s: float | None,
    *,
    key_padding_mask: torch.Tensor | None = None,
) -> None:
    """Raise on every rank of the group if a tensor of one rank holds NaN or an infinity.

    Args:
        tensors: Local tensors `(B, L, H, D)`, by name.
        group: The ranks that share the sequence, as in `ring_dilated_attention`.
        timeout_s: As there.
        key_padding_mask: `(B, L)`, True where k and v may hold anything.

    Raises:
        FloatingPointError: With the tensors, the ranks (of the world) and how many values.
        RankFailure: If a rank has failed, or does not come in time.
    """
    me = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
    levels = group[::-1] if isinstance(group, tuple) else (group,)
    parts = [part for part in map(resolve_group, levels) if part.process_group is not None]
    with ExitStack() as stack:
        transports: list[DistributedTransport] = []
        for part in parts:
            transports.append(DistributedTransport(part.process_group, timeout_s=timeout_s))
            stack.enter_context(reporting_failures(transports[-1], part.rank))
        counts = [_not_finite(name, x, key_padding_mask) for name, x in tensors.items()]
        found = torch.tensor([[me, *counts]], device="cpu")
        for part, transport in zip(parts, transports, strict=True):
            found = torch.cat(transport.all_gather(part.rank, found))
    faults = [
        f"{name} is not finite in {row[i]} places on rank {row[0]}"
        for i, name in enumerate(tensors, 1)
        for row in sorted(map(tuple, found.tolist()))  # pyright: ignore
        if row[i]
    ]
    if faults:
        raise FloatingPointError(
            f"{'; '.join(faults)}. Every rank raises this, so all can skip the step, or stop."
        )


def _not_finite(name: str, x: object, mask: object) -> int:
    """How many values. What attention will refuse, on all ranks at once, counts as none."""
    if not isinstance(x, torch.Tensor):
        return 0
    bad = ~x.detach().isfinite()
    if name in ("k", "v") and isinstance(mask, torch.Tensor) and mask.shape == x.shape[:2]:
        bad = bad.masked_fill(mask[..., None, None].bool(), value=False)
    return int(bad.sum())
