"""Messages over torch.distributed: point-to-point within a process group.

The code for NCCL is small and was not run by the tests, which have no GPUs: batched operations of a
step, and `all_gather` through the GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist

from dilated_ring.transport.messages import check_messages, num_bytes

_GATHER_TAG = 0


class DistributedTransport:
    """Carries messages between the ranks of a process group.

    Ranks are those of the group, 0 to size - 1, whatever their ranks in the world are. Messages of
    different groups never meet. Within a group they meet by the name of their step, so several
    steps may be in flight.

    Example:
        On rank 1 of 3, pass k on to rank 2 and receive that of rank 0::

            pending = transport.start(1, {2: k}, {0: buffer}, step="hop 1 of k")
            pending.wait()[0]

    Attributes:
        size: Ranks of the group.
        hosted: This rank alone.
        sent_bytes: Bytes of the messages sent so far. Those of `all_gather` are not counted.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Use a group that this rank belongs to.

        Args:
            group: Default: all ranks.
            timeout_s: Seconds that a wait may take on the host. Default: 15 where the group carries
                CPU tensors (gloo), 600 where it carries none. Messages between GPUs are waited for
                by the GPU and end after the timeout of the group itself, see
                `torch.distributed.init_process_group`.
        """
        self._group = group or dist.group.WORLD
        self._rank = dist.get_rank(self._group)
        if self._rank < 0:
            raise ValueError(
                f"rank {dist.get_rank()} does not belong to the group "
                f"{dist.get_process_group_ranks(self._group)}. Only ranks of the group may use it."
            )
        self.size = dist.get_world_size(self._group)
        self.hosted = (self._rank,)
        self.sent_bytes = 0
        # "cpu:gloo,cuda:nccl" names a backend for each type of device.
        self._devices = [
            entry.split(":")[0] for entry in dist.get_backend_config(self._group).split(",")
        ]
        on_host = "cpu" in self._devices
        self.timeout_s = timeout_s or (15.0 if on_host else 600.0)

    def start(
        self,
        rank: int,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        *,
        step: str,
    ) -> _DistributedPending:
        """Post all sends and receives of the step. Empty messages are not sent.

        The other ranks of the step post theirs under the same name. All tensors of a step are on
        one device. With NCCL a first call of `all_gather`, by all ranks, must have gone before.

        Raises:
            RuntimeError: If a message goes to `rank` itself or outside the group, or is not
                contiguous.
        """
        check_messages(rank, self.size, sends, receives, step)
        # The lowest bit keeps the tag apart from that of all_gather. NCCL has no tags; its messages
        # between two ranks meet in the order of their steps, which is the same on all ranks.
        tag = (crc32(step.encode()) & 0x7FFFFFFF) | 1
        ops = [
            dist.P2POp(function, tensor, group=self._group, tag=tag, group_peer=peer)
            for function, messages in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in sorted(messages.items())
            if tensor.numel()
        ]
        self.sent_bytes += num_bytes(sends)
        return _DistributedPending(self, ops, receives, step)

    def all_gather(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        """A small CPU tensor of equal shape from every rank, by rank.

        Raises:
            RuntimeError: If a rank does not send its value in time.
        """
        if "cpu" not in self._devices:
            return self._gather_over_device(value)
        # Between all pairs: the connection that breaks tells the rank that died, and 2 gloo ranks
        # need a third of the time of dist.all_gather.
        others = [peer for peer in range(self.size) if peer != rank]
        values = {peer: torch.empty_like(value) for peer in others}
        ops = [
            dist.P2POp(function, tensor, group=self._group, tag=_GATHER_TAG, group_peer=peer)
            for peer in others
            for function, tensor in ((dist.isend, value), (dist.irecv, values[peer]))
        ]
        _DistributedPending(self, ops, values, "agreement").wait()
        return [values.get(peer, value) for peer in range(self.size)]

    def _gather_over_device(self, value: torch.Tensor) -> list[torch.Tensor]:
        local = value.to(self._devices[0])
        values = [torch.empty_like(local) for _ in range(self.size)]
        dist.all_gather(values, local, group=self._group)
        return [gathered.cpu() for gathered in values]


class _DistributedPending:
    """The messages of one rank in one step."""

    def __init__(
        self,
        transport: DistributedTransport,
        ops: list[dist.P2POp],
        receives: Mapping[int, torch.Tensor],
        step: str,
    ) -> None:
        self._transport = transport
        # The operations hold the tensors until `wait` has returned.
        self._ops = ops
        self._receives = receives
        self._step = step
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> Mapping[int, torch.Tensor]:
        timeout = timedelta(seconds=self._transport.timeout_s)
        for index, work in enumerate(self._works):
            op = self._ops[index]
            if op.tensor.device.type != "cpu":
                # Orders the stream; the host goes on.
                work.wait()
                continue
            try:
                work.wait(timeout)
            except RuntimeError as error:
                raise RuntimeError(
                    f"{self._step}: message of rank {op.group_peer}: {error}"
                ) from error
        self._works = []
        self._ops = []
        return self._receives
