"""What a transport is: messages between ranks in steps that all ranks plan alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch


class Pending(Protocol):
    """Messages of one rank that are on their way."""

    def wait(self) -> Mapping[int, torch.Tensor]:
        """Block until all have come and gone; return what came, by the rank that sent it."""
        ...


class Transport(Protocol):
    """Carries messages between the ranks of one group.

    One process may be several ranks: `hosted` lists them. Their messages are started in turn, and
    waited for only after each of them has started its messages of that step.

    Attributes:
        size: Ranks of the group.
        hosted: The ranks that run in this process: one over torch.distributed, all in one process.
        sent_bytes: Bytes that the hosted ranks have sent so far.
    """

    size: int
    hosted: tuple[int, ...]
    sent_bytes: int

    def start(
        self,
        rank: int,
        sends: Mapping[int, torch.Tensor],
        receives: Mapping[int, torch.Tensor],
        *,
        step: str,
    ) -> Pending:
        """Start the messages of a step without waiting for them.

        Args:
            rank: One of `hosted`.
            sends: Contiguous tensors by destination; never to `rank` itself, and not changed until
                `wait` has returned.
            receives: Contiguous tensors to fill, by source.
            step: What is exchanged, for errors, such as "hop 2 of 3 of k and v".
        """
        ...

    def all_gather(self, rank: int, value: torch.Tensor) -> list[torch.Tensor]:
        """A small CPU tensor of equal shape from every rank, by rank.

        Over several hosted ranks the caller collects the values itself.
        """
        ...
