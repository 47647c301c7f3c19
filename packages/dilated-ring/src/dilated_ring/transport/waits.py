"""What a rank does, as the ranks of a group tell each other, and which rank holds up the others."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Report:
    """What a rank tells the others.

    Attributes:
        call: How many calls the rank has begun.
        step: The step that it is in, or was in last.
        peers: The ranks that it waits for, counted in the group; none if it does not wait.
        position: The line of code at which it is.
        is_backward: Whether the call is part of a backward pass.
    """

    call: int
    step: str
    peers: tuple[int, ...]
    position: str
    is_backward: bool = False

    def encode(self) -> str:
        """As text for the store of the group."""
        fields = self.call, self.step, self.peers, self.position, self.is_backward
        return json.dumps(fields)

    @staticmethod
    def decode(text: bytes) -> Report:
        """From the text of `encode`."""
        call, step, peers, position, is_backward = json.loads(text)
        return Report(call, step, tuple(peers), position, is_backward)

    def describe(self, peers: Sequence[int]) -> str:
        """In words, with the names of the ranks that it waits for."""
        if peers:
            names = ", ".join(map(str, peers))
            which = f"call {self.call}{', a backward pass' if self.is_backward else ''}"
            return f"waits for rank {names} in {which}, step {self.step!r}"
        return (
            f"is at {self.position or 'an unknown line'}, not in an exchange, in call {self.call}, "
            f"{after(self.step)}"
        )


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """What the thread of this rank that exchanges messages does.

    Attributes:
        call: As in `Report`.
        step: As in `Report`.
        peers: As in `Report`.
        since: When this wait, or the time between two waits, began, by `time.monotonic`.
        limit_s: Seconds that a wait may take.
        thread: The thread.
        is_backward: As in `Report`.
    """

    call: int
    step: str
    peers: tuple[int, ...]
    since: float = field(default_factory=time.monotonic)
    limit_s: float = 15.0
    thread: int = field(default_factory=threading.get_ident)
    is_backward: bool = False

    def report(self) -> Report:
        """What this rank tells the others; called by another thread."""
        frame = sys._current_frames().get(self.thread)  # pyright: ignore[reportPrivateUsage]
        position = ""
        if frame is not None:
            name = Path(frame.f_code.co_filename).name
            position = f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"
        return Report(self.call, self.step, self.peers, position, self.is_backward)


def after(step: str) -> str:
    """Where a rank is that waits for nothing, in words."""
    return f"after step {step!r}" if step else "before its first step"


def blocking_ranks(rank: int, waits: Mapping[int, Sequence[int]]) -> tuple[list[int], list[int]]:
    """Follow who waits for whom, from `rank` on.

    Example:
        >>> blocking_ranks(0, {0: [1], 1: [2], 3: [0]})
        ([2], [0, 1])

    Args:
        rank: A rank that waits.
        waits: For ranks that wait, the ranks that they wait for.

    Returns:
        The ranks at the ends, which wait for nobody, and the ranks on the way to them. Without
        an end, the ranks on the way wait for each other.
    """
    ends: set[int] = set()
    way: set[int] = set()
    todo = [rank]
    while todo:
        current = todo.pop()
        peers = waits.get(current, ())
        if not peers:
            ends.add(current)
        elif current not in way:
            way.add(current)
            todo.extend(peers)
    return sorted(ends), sorted(way)


def rank_out_of_step(reports: Mapping[int, Report]) -> tuple[int, str]:
    """Of ranks that wait for each other, the one that does something else, and what it does.

    Every rank runs backward if one does. So a rank that has begun another forward while others are
    in backward has left theirs out. Otherwise it is the rank that has begun the fewest calls.

    Example:
        >>> backward, forward = Report(3, "rows", (1,), "", True), Report(3, "lengths", (0,), "")
        >>> rank_out_of_step({0: backward, 1: forward})
        (1, 'it did not run the backward pass that rank 0 runs; ')

    Args:
        reports: What each of these ranks has told.
    """
    backward = [rank for rank, report in reports.items() if report.is_backward]
    calls = [reports[rank].call for rank in backward]
    ahead = [
        rank
        for rank, report in reports.items()
        if backward and not report.is_backward and report.call >= max(calls)
    ]
    if ahead:
        them = f"rank{'s' if len(backward) > 1 else ''} {', '.join(map(str, sorted(backward)))}"
        verb = "run" if len(backward) > 1 else "runs"
        return min(ahead), f"it did not run the backward pass that {them} {verb}; "
    return min(reports, key=lambda rank: (reports[rank].call, rank)), ""
