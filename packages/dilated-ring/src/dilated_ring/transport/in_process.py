"""All ranks in one process: the same steps and the same bytes, without a process group."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping

import torch

from dilated_ring.transport.messages import check_messages, num_bytes


class InProcessTransport:
    """Carries messages between ranks that share one process.

    Example:
        >>> transport = InProcessTransport(2)
        >>> first = transport.start(0, {1: torch.ones(3)}, {}, step="hop 1")
        >>> second = transport.start(1, {}, {0: torch.zeros(3)}, step="hop 1")
        >>> second.wait()[0]
        tensor([1., 1., 1.])

    Attributes:
        size: Ranks of the group.
        hosted: All ranks.
        sent_bytes: Bytes sent so far, by all ranks together.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hosted = tuple(range(size))
        self.sent_bytes = 0
        # By (step, source, destination): a step of the same name may start again before the first
        # one is received.
        self._mailboxes: defaultdict[tuple[str, int, int], deque[torch.Tensor]] = defaultdict(deque)

    @property
    def undelivered(self) -> list[str]:
        """Messages that were sent and not received: a fault of the plan once a call has ended."""
        return [
            f"{step}: {len(box)} message(s) from rank {source} to rank {destination}"
            for (step, source, destination), box in self._mailboxes.items()
        ]

    def start(
        self,
        rank: int,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        *,
        step: str,
    ) -> _InProcessPending:
        """Put copies of `sends` into the mailboxes of their destinations.

        Raises:
            RuntimeError: If a message goes to `rank` itself or outside the group, or is not
                contiguous.
        """
        check_messages(rank, self.size, sends, receives, step)
        for destination, tensor in sends.items():
            # Empty messages are not sent: torch.distributed skips them, too.
            if tensor.numel():
                self._mailboxes[step, rank, destination].append(tensor.detach().clone())
        self.sent_bytes += num_bytes(sends)
        return _InProcessPending(self, rank, receives, step)

    def all_gather(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        """The value of the only rank.

        Raises:
            RuntimeError: If there are several ranks: the caller holds the values of all of them.
        """
        if self.size > 1:
            raise RuntimeError(
                f"rank {rank} gathers a value over {self.size} ranks of one process. The caller "
                f"holds the values of all ranks and collects them itself."
            )
        return [value]

    def take(self, step: str, source: int, destination: int, like: torch.Tensor) -> torch.Tensor:
        """The message out of the mailbox.

        Raises:
            RuntimeError: If there is none, or not of the shape and dtype of `like`.
        """
        key = (step, source, destination)
        where = f"{step}, from rank {source} to rank {destination}"
        box = self._mailboxes.get(key)
        if not box:
            raise RuntimeError(f"{where}: the message is received and was never sent.")
        message = box.popleft()
        if not box:
            del self._mailboxes[key]
        if message.shape != like.shape or message.dtype != like.dtype:
            raise RuntimeError(
                f"{where}: sent with shape {tuple(message.shape)} and {message.dtype}, received "
                f"with shape {tuple(like.shape)} and {like.dtype}."
            )
        return message


class _InProcessPending:
    """The receives of one rank in one step."""

    def __init__(
        self,
        transport: InProcessTransport,
        rank: int,
        receives: Mapping[int, torch.Tensor],
        step: str,
    ) -> None:
        self._transport = transport
        self._rank = rank
        self._receives = receives
        self._step = step

    def wait(self) -> Mapping[int, torch.Tensor]:
        for source, target in self._receives.items():
            if target.numel():
                target.copy_(self._transport.take(self._step, source, self._rank, target))
        return self._receives
