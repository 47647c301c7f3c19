"""Find the rank of a group that fails, and end the others with its cause.

A rank that fails publishes the cause in the store of the group, then closes its connections. Ranks
that wait for it wake up, read the cause, close theirs and raise. A thread uses the store, because
calls of a store block when the process that hosts it is stopped. The thread only compares two
values per group and tick while no wait is longer than a tick.

On NCCL the GPU waits, not the host. There a failure is found by the next `all_gather`, which the
host waits for. The tests, which have no GPUs, did not run these lines.
"""

from __future__ import annotations

import atexit
import json
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from dilated_ring.transport.errors import RankFailure
from dilated_ring.transport.waits import (
    Report,
    Whereabouts,
    after,
    blocking_ranks,
    rank_out_of_step,
)

_Result = TypeVar("_Result")

TICK_S = 0.25

# Shares of the time that a wait may take: when the thread gives it up, and when the host stops
# waiting for the thread. The other ranks learn of the failure in the rest.
_THREAD_GIVES_UP = 0.85
HOST_GIVES_UP = 0.95

# Messages have odd tags.
_CLOSING_TAG = 2

# Who hosts the store unless torchrun does.
_STORE_HOST = 0

# Keys in the store.
_FAILURE = "dilated_ring failure"
_RANK = "dilated_ring rank {}"


class GroupWatch:
    """What this process knows about failures in one group.

    Attributes:
        failure: The failure that ended the group, or None.
        ranks: The ranks of the group, as the world counts them.
        name: This rank, as the world counts it.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.failure: RankFailure | None = None
        self.ranks = dist.get_process_group_ranks(group)
        self._rank = dist.get_rank(group)
        self.name = self.ranks[self._rank]
        # A weak reference: the group is the key under which this object is kept.
        self._group = ref(group)
        self._on_host = "cpu:" in dist.get_backend_config(group)
        self._store = group.get_group_store()
        self._store_error = ""
        self._now = Whereabouts(0, "", ())
        self._published: Whereabouts | None = None
        # The rank and the cause that the thread shall publish.
        self._suspect: tuple[int, str] | None = None
        self._ended = threading.Event()
        # Of the thread that is in a call; calls in one thread may nest.
        self._in_call = threading.RLock()

    # The thread that exchanges messages calls these.

    def begin_call(self) -> None:
        """Count a call.

        Raises:
            RankFailure: If a rank has failed before.
        """
        self.refuse_after_failure()
        now = self._now
        # Also true for a forward that an activation checkpoint repeats in a backward pass.
        is_backward = torch._C._current_graph_task_id() != -1  # pyright: ignore
        self._now = Whereabouts(
            now.call + 1, now.step, (), limit_s=now.limit_s, is_backward=is_backward
        )

    @contextmanager
    def one_thread(self) -> Generator[None]:
        """Refuse a call while another thread of this process is in one.

        Messages meet by the name of their step: with two threads, those of one call would reach the
        other call, which computes wrong numbers.

        Raises:
            RuntimeError: If another thread is in a call.
        """
        if not self._in_call.acquire(blocking=False):
            raise RuntimeError(
                "two threads use one group at the same time, and their messages would mix; make "
                "the calls in one thread, or give each thread a group of its own."
            )
        try:
            yield
        finally:
            self._in_call.release()

    def begin_wait(self, step: str, peers: tuple[int, ...], since: float, limit_s: float) -> None:
        """Note which ranks of the group this one waits for."""
        now = self._now
        self._now = Whereabouts(now.call, step, peers, since, limit_s, is_backward=now.is_backward)

    def end_wait(self) -> None:
        """Note that this rank does not wait."""
        now = self._now
        self._now = Whereabouts(
            now.call, now.step, (), limit_s=now.limit_s, is_backward=now.is_backward
        )

    def refuse_after_failure(self) -> None:
        """Raise the failure that ended the group, if there is one."""
        if self.failure is not None:
            raise RankFailure(self.failure.rank, self.failure.cause)

    def broken(self, peer: int, step: str, error: Exception) -> RankFailure:
        """The failure behind an operation with `peer` that raised `error`."""
        now = self._now
        if now.peers and time.monotonic() - now.since > _THREAD_GIVES_UP * now.limit_s:
            return self.overdue(peer, step)
        return self._ask(
            self.ranks[peer],
            f"its connection to rank {self.name} broke in call {now.call}, step {step!r}. The "
            f"process was killed, or exited without a report ({_reason(error)}).",
        )

    def overdue(self, peer: int, step: str) -> RankFailure:
        """The failure behind a wait for `peer` that took too long."""
        # No suspect: the thread follows who waits for whom.
        left_s = self._now.since + self._now.limit_s - time.monotonic()
        return self._ask(None, self._overdue_cause(step), self.ranks[peer], max(0.1, left_s))

    def fail(self, cause: str) -> None:
        """Publish that this rank failed, and close its connections."""
        now = self._now
        self._ask(self.name, f"{cause} It was in call {now.call}, {after(now.step)}.")

    def _ask(
        self, suspect: int | None, cause: str, otherwise: int = -1, patience_s: float = 5.0
    ) -> RankFailure:
        """The failure that the thread publishes, or finds published by another rank."""
        if self.failure is None:
            if suspect is not None:
                self._suspect = (suspect, cause)
            _wake.set()
            self._ended.wait(patience_s)
        if self.failure is None:
            # The store blocks the thread, so this rank can only tell what it knows itself.
            rank = otherwise if suspect is None else suspect
            self._end(rank, f"{cause} The store of the group did not answer in time.")
        assert self.failure is not None
        return RankFailure(self.failure.rank, self.failure.cause)

    # The thread of the store calls these.

    def tick(self) -> None:
        """Publish what other ranks should know, and end with a failure that is published."""
        if self._suspect is not None:
            self._publish(*self._suspect)
            return
        now = self._now
        stalled_s = time.monotonic() - now.since
        if now.peers and stalled_s > TICK_S:
            self._publish_whereabouts(now)
            published = self._get(_FAILURE)
            if published is not None:
                self._end(*json.loads(published))
            elif stalled_s > _THREAD_GIVES_UP * now.limit_s:
                self._publish(*self._diagnose(now))
        elif not now.peers and stalled_s > now.limit_s / 4:
            self._publish_whereabouts(now)
        elif self._published is not None and self._published is not now:
            self._published = None
            self._with_store(lambda: self._store.delete_key(_RANK.format(self.name)))

    def hear_of(self, failure: RankFailure) -> None:
        """Publish a failure that another group of this process ended with.

        This rank is about to exit. Without it, the other ranks of this group would see that it
        exited, and not why.
        """
        if self.failure is None:
            text = json.dumps([failure.rank, failure.cause])
            self._with_store(lambda: self._store.compare_set(_FAILURE, "", text))

    def _publish_whereabouts(self, now: Whereabouts) -> None:
        if self._published is not now:
            self._published = now
            text = now.report().encode()
            self._with_store(lambda: self._store.set(_RANK.format(self.name), text))

    def _publish(self, rank: int, cause: str) -> None:
        """Publish a failure and end with it, or with the one that was published before."""
        text = json.dumps([rank, cause])
        published = self._with_store(lambda: self._store.compare_set(_FAILURE, "", text))
        if published is not None:
            self._end(*json.loads(published))
            return
        # A rank that exits closes its connections like one that died, and the causes that ranks
        # published are out of reach. The rank that hosts the store is the likeliest to be first.
        broken = self._broken_connections()
        if broken:
            rank = _STORE_HOST if _STORE_HOST in broken else rank
            cause = f"{cause} The connections of rank {self.name} to the ranks {broken} are broken."
        self._end(
            rank,
            f"{cause} The store of the group cannot be reached either ({self._store_error}); it is "
            f"hosted by torchrun or by rank {_STORE_HOST}.",
        )

    def _get(self, key: str) -> bytes | None:
        # `get` blocks until the key is there.
        return self._with_store(lambda: self._store.get(key) if self._store.check([key]) else None)

    def _with_store(self, operation: Callable[[], _Result]) -> _Result | None:
        try:
            return operation()
        except RuntimeError as error:
            self._store_error = _reason(error)
            return None

    def _diagnose(self, now: Whereabouts) -> tuple[int, str]:
        """The rank that holds this one up, and what it does."""
        found = {rank: self._get(_RANK.format(rank)) for rank in self.ranks if rank != self.name}
        reports = {rank: Report.decode(text) for rank, text in found.items() if text is not None}
        reports[self.name] = now.report()
        # Reports name ranks of the group.
        waits = {rank: [self.ranks[p] for p in report.peers] for rank, report in reports.items()}
        blocking, waiting = blocking_ranks(self.name, waits)
        if not blocking:
            states = "; ".join(f"rank {r} {reports[r].describe(waits[r])}" for r in waiting)
            rank, why = rank_out_of_step({rank: reports[rank] for rank in waiting})
            differ = "ranks wait for each other, so their plans or messages differ"
            return rank, f"{why}{differ}: {states}."
        cause = self._overdue_cause(now.step)
        rank = blocking[0]
        others = f" The ranks {blocking[1:]} hold it up, too." if blocking[1:] else ""
        if rank in reports:
            return rank, f"{cause} It {reports[rank].describe([])}.{others}"
        return rank, (
            f"{cause} It has not reported what it does: it hangs in native code, is stopped or cut "
            f"off, or has just come late.{others}"
        )

    def _overdue_cause(self, step: str) -> str:
        now = self._now
        return (
            f"it holds up rank {self.name}, which has waited {time.monotonic() - now.since:.1f} s "
            f"of at most {now.limit_s:g} s in call {now.call}, step {step!r}."
        )

    def _end(self, rank: int, cause: str) -> None:
        """Keep the failure and close the connections, so that ranks that wait wake up."""
        if self.failure is None:
            self.failure = RankFailure(rank, cause)
        self._close()
        self._ended.set()

    def _others(self) -> list[int]:
        return [peer for peer in range(len(self.ranks)) if peer != self._rank]

    def _broken_connections(self) -> list[int]:
        group = self._group()
        broken: list[int] = []
        for peer in self._others() if self._on_host else []:
            try:
                dist.isend(
                    torch.zeros(1, device="cpu"), group=group, group_dst=peer, tag=_CLOSING_TAG
                )
            except RuntimeError:
                broken.append(self.ranks[peer])
        return broken

    def _close(self) -> None:
        group = self._group()
        if group is None:
            return
        if not self._on_host:
            group.abort()
            return
        # A wait that runs out of time closes all connections of a gloo group, unless its own one
        # was broken before; so each is tried.
        for peer in self._others():
            with suppress(RuntimeError):
                work = dist.irecv(
                    torch.zeros(1, device="cpu"), group=group, group_src=peer, tag=_CLOSING_TAG
                )
                if work is not None:
                    work.wait(timedelta(milliseconds=1))


_watches: WeakKeyDictionary[dist.ProcessGroup, GroupWatch] = WeakKeyDictionary()
_lock = threading.Lock()
_wake = threading.Event()
_exiting = threading.Event()
_thread: threading.Thread | None = None


def watch_of(group: dist.ProcessGroup) -> GroupWatch:
    """The watch of a group: one for all transports over it."""
    global _thread
    with _lock:
        watch = _watches.get(group)
        if watch is None:
            watch = _watches[group] = GroupWatch(group)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_run, name="dilated-ring watch", daemon=True)
            _thread.start()
            # A thread inside PyTorch while Python shuts down can abort the process.
            atexit.register(_stop, _thread)
    return watch


def _reason(error: Exception) -> str:
    """The first sentence of an error of PyTorch, without the place in its C++ code."""
    line = str(error).split("\n", 1)[0]
    return re.sub(r"^\[\S+\] ", "", line).split(". ", 1)[0].rstrip(".")


def _run() -> None:
    while not _exiting.is_set():
        _wake.wait(TICK_S)
        _wake.clear()
        with _lock:
            watches = list(_watches.values())
        for watch in watches:
            if watch.failure is not None:
                continue
            watch.tick()
            if watch.failure is not None:
                for other in watches:
                    other.hear_of(watch.failure)
        # Groups are freed as soon as nobody else holds them.
        watches.clear()


def _stop(thread: threading.Thread) -> None:
    _exiting.set()
    _wake.set()
    thread.join(timeout=1.0)
