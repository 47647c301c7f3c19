"""Attention over an exchange as one differentiable function of the shards of all hosted ranks."""

from __future__ import annotations

from typing import Any

import torch
from dilated_core import AttentionOutput
from torch.autograd.function import once_differentiable

from dilated_ring.execution.attend import backward, forward
from dilated_ring.execution.tasks import Shards, Work
from dilated_ring.transport.faults import reporting_failures


def attend_shards(work: Work, q: Shards, k: Shards, v: Shards) -> list[AttentionOutput]:
    """`out` `(B, L, H, D)` in the dtype of q and `lse` `(B, L, H)` of each hosted rank.

    Gradients flow through out and lse; they cannot be differentiated again. All ranks of the group
    must run backward, as with every collective operation.
    """
    results: tuple[torch.Tensor, ...] = _RingAttention.apply(work, *q, *k, *v)  # pyright: ignore
    n = len(q)
    return [AttentionOutput(*pair) for pair in zip(results[:n], results[n:], strict=True)]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, work: Work, *shards: torch.Tensor) -> tuple[torch.Tensor, ...]:
        shards = tuple(x.contiguous() for x in shards)
        q, k, v = _thirds(shards)
        with torch.autocast(q[0].device.type, enabled=False):
            results = forward(work, q, k, v)
        out = tuple(r.out.to(x.dtype) for r, x in zip(results, q, strict=True))
        lse = tuple(r.lse for r in results)
        ctx.work = work
        ctx.save_for_backward(*shards, *out, *lse)
        ctx.set_materialize_grads(False)
        return *out, *lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        n = len(grads) // 2
        saved: tuple[torch.Tensor, ...] = ctx.saved_tensors
        q, k, v = _thirds(saved[: 3 * n])
        out, lse = saved[3 * n : 4 * n], saved[4 * n :]
        # A rank whose out is not used runs its steps too, because other ranks wait for its rows.
        dout = [
            torch.zeros_like(x) if g is None else g.contiguous()
            for g, x in zip(grads[:n], out, strict=True)
        ]
        dlse = [None if g is None else g.contiguous() for g in grads[n:]]
        transport = ctx.work.transport
        with (
            reporting_failures(transport, transport.hosted[0]),
            torch.autocast(q[0].device.type, enabled=False),
        ):
            results = backward(ctx.work, dout, dlse, q, k, v, out, lse)
        dq, dk, dv = (
            [grad.to(x.dtype) for grad, x in zip(part, like, strict=True)]
            for part, like in zip(zip(*results, strict=True), (q, k, v), strict=True)
        )
        return None, *dq, *dk, *dv


def _thirds(
    shards: tuple[torch.Tensor, ...],
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    n = len(shards) // 3
    return shards[:n], shards[n : 2 * n], shards[2 * n :]
