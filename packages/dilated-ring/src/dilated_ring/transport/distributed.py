"""Messages over torch.distributed: point-to-point within a process group.

What only NCCL uses is small, and the tests, which have no GPUs, did not run it: the batch of a
step, and `all_gather` through the GPU.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist

from dilated_ring.transport.messages import check_messages, num_bytes
from dilated_ring.transport.watch import HOST_GIVES_UP, watch_of

_GATHER_STEP = "agreement of all ranks"

# In place of the peer of one message: all messages of a step between GPUs.
_ON_GPU = -1


class DistributedTransport:
    """Carries messages between the ranks of a process group.

    Ranks are those of the group, 0 to size - 1, whatever their ranks in the world are. Messages of
    different groups never meet. Within a group they meet by the name of their step, so several
    steps may be in flight; over gloo by size and dtype, too, so that a message which another rank
    expects otherwise ends in an error.

    If a rank fails, all others raise `RankFailure`, which names it and the cause. The group is then
    closed: no message is ever sent twice.

    Example::

        # On rank 1 of 3: pass k on to rank 2 and receive that of rank 0.
        pending = transport.start(1, {2: k}, {0: buffer}, step="hop 1 of k")
        pending.wait()[0]

    Attributes:
        size: Ranks of the group.
        hosted: This rank alone.
        sent_bytes: Bytes of the messages sent so far. Those of `all_gather` are not counted.
        timeout_s: Seconds within which a wait ends.
        watch: What is known of failures in the group; one object for all transports of a group.
    """

    def __init__(
        self, group: dist.ProcessGroup | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Use a group that this rank belongs to.

        Args:
            group: Default: all ranks.
            timeout_s: Seconds within which a wait of the host ends, with the messages or with an
                error. Choose more than the longest time for which one rank may be busy while
                another waits for it. Default: 15 where the group carries CPU tensors (gloo), else
                600. On NCCL the GPU waits for messages, without this limit; it ends after the
                timeout of the group, see `torch.distributed.init_process_group`.

        Raises:
            ValueError: If this rank is not in the group, or `timeout_s` is not above zero.
        """
        self._group = dist.group.WORLD if group is None else group
        if self._group is None or dist.get_rank(self._group) < 0:
            raise ValueError(
                f"group does not include rank {dist.get_rank()}; create the transport only on the "
                f"ranks of the group."
            )
        # "cpu:gloo,cuda:nccl" names a backend for each type of device.
        backends = dist.get_backend_config(self._group).split(",")
        self._devices = [backend.split(":")[0] for backend in backends]
        self.timeout_s = (
            (15.0 if "cpu" in self._devices else 600.0) if timeout_s is None else timeout_s
        )
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s is {timeout_s}; it must be above 0 seconds.")
        self.size = dist.get_world_size(self._group)
        self.hosted = (dist.get_rank(self._group),)
        self.sent_bytes = 0
        self.watch = watch_of(self._group)

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
        one device. With NCCL all ranks of the group must have called `all_gather` before.

        Raises:
            RuntimeError: If a message goes to `rank` itself or outside the group, or is not
                contiguous.
            RankFailure: If a rank of the group has failed.
        """
        check_messages(rank, self.size, sends, receives, step)
        pending = self._post(sends, receives, step)
        self.sent_bytes += num_bytes(sends)
        return pending

    def all_gather(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        """A small CPU tensor of equal shape from every rank, by rank.

        Raises:
            RankFailure: If a rank of the group has failed, or does not send its value in time.
        """
        if "cpu" not in self._devices:
            return self._gather_over_gpu(rank, value)
        # Between all pairs: the connection that breaks tells which rank died, and 2 gloo ranks need
        # half the time of dist.all_gather.
        others = [peer for peer in range(self.size) if peer != rank]
        received = {peer: torch.empty_like(value) for peer in others}
        self._post(dict.fromkeys(others, value), received, _GATHER_STEP).wait()
        return [received.get(peer, value) for peer in range(self.size)]

    def _gather_over_gpu(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        self.watch.refuse_after_failure()
        local = value.to(self._devices[0])
        values = [torch.empty_like(local) for _ in range(self.size)]
        work = dist.all_gather(values, local, group=self._group, async_op=True)
        since = time.monotonic()
        peers = tuple(peer for peer in range(self.size) if peer != rank)
        self.watch.begin_wait(_GATHER_STEP, peers, since, self.timeout_s)
        while not work.is_completed():
            self.watch.refuse_after_failure()
            if time.monotonic() - since > HOST_GIVES_UP * self.timeout_s:
                raise self.watch.overdue(peers[0], _GATHER_STEP)
            time.sleep(1e-4)
        self.watch.end_wait()
        return [gathered.cpu() for gathered in values]

    def _post(
        self,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        step: str,
    ) -> _DistributedPending:
        self.watch.refuse_after_failure()
        # The same order on all ranks.
        messages = [
            (operation, peer, tensor)
            for operation, tensors in ((dist.isend, sends), (dist.irecv, receives))
            for peer, tensor in sorted(tensors.items())
            if tensor.numel()
        ]
        works: list[tuple[int, dist.Work]] = []
        if messages and messages[0][2].device.type != "cpu":
            # NCCL has no tags: messages of two ranks meet in the order of their steps.
            ops = [
                dist.P2POp(operation, tensor, group=self._group, group_peer=peer)
                for operation, peer, tensor in messages
            ]
            works = [(_ON_GPU, work) for work in dist.batch_isend_irecv(ops)]
        else:
            for operation, peer, tensor in messages:
                side = "group_dst" if operation is dist.isend else "group_src"
                try:
                    work = operation(
                        tensor, group=self._group, tag=_tag(step, tensor), **{side: peer}
                    )
                except RuntimeError as error:
                    raise self.watch.broken(peer, step, error) from error
                if work is not None:
                    works.append((peer, work))
        return _DistributedPending(self, works, sends, receives, step)


def _tag(step: str, tensor: torch.Tensor) -> int:
    """By which gloo lets messages meet: never another step, size or dtype.

    Otherwise a receiver would keep zeros where a message is too short, and gloo ends the process
    where it is too long. The tag is odd, because the watch uses an even one.
    """
    text = f"{step} {tensor.numel()} {tensor.dtype}"
    return (crc32(text.encode()) & 0x7FFFFFFF) | 1


class _DistributedPending:
    """The messages of one rank in one step."""

    def __init__(
        self,
        transport: DistributedTransport,
        works: list[tuple[int, dist.Work]],
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        step: str,
    ) -> None:
        self._transport = transport
        self._works = works
        # Keeps the tensors alive.
        self._sends = sends
        self._receives = receives
        self._step = step

    def wait(self) -> Mapping[int, torch.Tensor]:
        watch, limit_s = self._transport.watch, self._transport.timeout_s
        since = time.monotonic()
        for peer, work in self._works:
            if peer == _ON_GPU:
                # The stream waits; the host goes on.
                work.wait()
                continue
            watch.begin_wait(self._step, (peer,), since, limit_s)
            left_s = since + HOST_GIVES_UP * limit_s - time.monotonic()
            try:
                work.wait(timedelta(seconds=max(left_s, 0.001)))
            except RuntimeError as error:
                raise watch.broken(peer, self._step, error) from error
        watch.end_wait()
        self._works = []
        return self._receives
