"""The processes of a run: how they meet, what they agree on, and which of them is missing."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import (
    rendezvous,  # pyright: ignore[reportUnknownVariableType]
)

from dilated_models.training.devices import choose_device, device_of_process
from dilated_models.training.failures import RankLost
from dilated_models.training.stopping import Stopped

_Result = TypeVar("_Result")

TIMEOUT_S = 600.0
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Ranks that a lost one held up fail within a moment of each other; then the roll is called.
_ROLL_CALL_S = 5.0
_BEGUN = "dilated_models begun run"
_NOTE = "dilated_models note"
_OF_COMMUNICATION = re.compile(
    r"gloo|NCCL|c10d|[Cc]onnection (closed|reset|refused)|Broken pipe|Timed out|[Ss]tore"
)


class Ranks:
    """The processes that train one model together. One process alone has nobody to talk to.

    Attributes:
        rank: Number of this process, from 0. Rank 0 writes files and prints.
        size: Number of processes.
        machines: Number of machines that they run on.
        device: Device of this process.
        timeout_s: Seconds that a process waits for another one.
        folder: Of the run, as soon as it holds one.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        rank: int = 0,
        size: int = 1,
        timeout_s: float = TIMEOUT_S,
        store: Store | None = None,
        start: int = 0,
        machines: int = 1,
    ) -> None:
        self.rank = rank
        self.size = size
        self.machines = machines
        self.device = device
        self.timeout_s = timeout_s
        self.folder: Path | None = None
        self._store = store
        self._start = start  # how often torchrun has started the processes again

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    # What all ranks call at the same place.

    def total(self, *numbers: int) -> list[int]:
        """The sum over the ranks of each number."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.int64, device="cpu")
        dist.all_reduce(total)
        return [int(number) for number in total]

    def largest(self, number: int) -> int:
        """The largest number of all ranks."""
        if self.size == 1:
            return number
        largest = torch.tensor([number], dtype=torch.int64, device="cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def of_first(self, value: _Result) -> _Result:
        """The value that rank 0 gives, on all ranks."""
        if self.size == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: _Result) -> list[_Result]:
        """The values of all ranks, on all ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def together(
        self,
        work: Callable[[], _Result],
        *,
        told: type[Exception] | tuple[type[Exception], ...] = Exception,
    ) -> _Result:
        """Call a function on all ranks; an error on one of them is raised on all.

        Args:
            work: The function. If it communicates, a rank that fails alone must not wait for the
                others here, which wait for it there.
            told: Kinds of errors that are raised on all ranks.
        """
        if self.size == 1:
            return work()
        result: _Result | None = None
        own: Exception | None = None
        try:
            result = work()
        except told as error:
            own = error
        try:
            found = self.gather(None if own is None else _portable(own))
        except RuntimeError:
            if own is not None:  # which is why this rank was not where the others waited for it
                raise own from None
            raise
        failed = [rank for rank, error in enumerate(found) if error is not None]
        if not failed:
            return cast("_Result", result)
        raised = own if own is not None else cast("Exception", found[failed[0]])
        if failed != list(range(self.size)):
            raised.add_note(f"on rank {failed[0]}")
        raise self.on_all(raised, failed[0])

    def first(self, work: Callable[[], _Result]) -> _Result:
        """Call a function on rank 0 only, and return its result on all ranks, or raise its error.

        The result must be such that `pickle` takes it.
        """
        result = self.together(lambda: work() if self.is_first else None)
        return cast("_Result", self.of_first(result))

    def same(self, what: str, value: object) -> None:
        """Check that all ranks have the same value.

        Raises:
            ValueError: On all ranks, if one has another value than rank 0.
        """
        others = [rank for rank, found in enumerate(self.gather(value)) if found != value]
        differ = self.gather(others)[0]

        def check() -> None:
            if differ:
                raise ValueError(
                    f"{what} of rank {differ[0]} differs from that of rank 0; all processes must "
                    f"have the same, so start them with the same options and files."
                )

        self.together(check)

    def on_all(self, error: Exception, told_by: int = 0) -> Exception:
        """The error, which all ranks are about to raise, so that one rank prints it."""
        error.__dict__["told_by"] = told_by
        return error

    def tells(self, error: BaseException) -> bool:
        """Whether this rank shall print the error: one that all ranks raise is printed by one."""
        return self.rank == error.__dict__.get("told_by", self.rank)

    # The run that an earlier start of these processes began.

    def remember_run(self, folder: Path) -> None:
        """Note at the launcher that these processes have begun a run, or continue it."""
        self.folder = folder
        if self._store is not None and self.is_first:
            self._store.set(_BEGUN, str(folder.resolve()))

    def begun_run(self) -> Path | None:
        """The folder of the run that these processes began before torchrun started them again.

        None if this is the first start, or no earlier one came so far.
        """
        if self._store is None or self._start == 0 or not self._store.check([_BEGUN]):
            return None
        return Path(self._store.get(_BEGUN).decode())

    def leave_note(self, text: str) -> None:
        """Leave a text at the launcher for the processes that it starts instead of these."""
        if self._store is not None:
            self._store.set(_NOTE, text)

    def left_note(self) -> str | None:
        """What an earlier start of these processes left; None once they have begun a run."""
        if self._store is None or self._start == 0 or not self._store.check([_NOTE]):
            return None
        return None if self._store.check([_BEGUN]) else self._store.get(_NOTE).decode()

    # Failures.

    @contextmanager
    def naming_the_missing(self) -> Generator[None]:
        """In the block, an error of communication becomes one that names the rank behind it.

        Every other error is reported to the ranks that wait for this one.

        Raises:
            RankLost: If another rank failed, was killed, or did not answer in time.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except Stopped:
            raise
        except BaseException as error:
            if "told_by" in error.__dict__:
                raise
            is_of_ring = _is_of_ring(error)
            if not is_of_ring and not _is_of_communication(error):
                self._answer(f"{type(error).__name__}: {error}")
                error.add_note(f"on rank {self.rank}")
                raise
            cause = self._call_roll()
            if cause is None and is_of_ring:
                cause = str(error)
            if cause is None:
                error.add_note(f"on rank {self.rank}")
                raise
            raise RankLost(f"rank {self.rank} stops: {cause}") from error

    def _answer(self, failure: str | None) -> None:
        """Tell the others that this rank lives, or how it failed; and wake those that wait."""
        assert self._store is not None
        with contextlib.suppress(RuntimeError):
            self._store.set_timeout(timedelta(seconds=2 * _ROLL_CALL_S))
            self._store.set(self._key(self.rank), json.dumps(failure))
        with contextlib.suppress(Exception):
            cast("Any", dist.group.WORLD).abort()  # closes connections, so others need not time out

    def _call_roll(self) -> str | None:
        """What happened to the ranks that failed, or which ones do not answer; None if all do."""
        assert self._store is not None
        self._answer(None)
        missing = set(range(self.size)) - {self.rank}
        failures: dict[int, str] = {}
        deadline = time.monotonic() + min(_ROLL_CALL_S, self.timeout_s)
        try:
            while missing and not failures and time.monotonic() < deadline:
                for rank in sorted(missing):
                    if self._store.check([self._key(rank)]):
                        missing.discard(rank)
                        failure = json.loads(self._store.get(self._key(rank)))
                        if failure is not None:
                            failures[rank] = failure
                time.sleep(0.05)
        except RuntimeError:
            return "rank 0, or whoever else hosts the store of the ranks, does not answer."
        if failures:
            return "; ".join(f"rank {rank} failed: {what}" for rank, what in failures.items())
        if not missing:
            return None
        names = ", ".join(map(str, sorted(missing)))
        return (
            f"rank {names} does not answer: it was killed, or hangs for longer than "
            f"{self.timeout_s:g} s."
        )

    def _key(self, rank: int) -> str:
        return f"dilated_models start {self._start} rank {rank}"


@contextmanager
def joined(device: str, *, timeout_s: float = TIMEOUT_S) -> Generator[Ranks]:
    """Join the processes that torchrun started together with this one.

    Without torchrun, or another program that sets its variables, this process is alone.

    Args:
        device: As in `choose_device`; `"auto"` and `"cuda"` give each process a GPU of its own.
        timeout_s: Seconds that a process waits for another one.

    Raises:
        RankLost: If the processes do not meet.
        ValueError: If this machine lacks the device, or a variable has a wrong value.
    """
    if not all(name in os.environ for name in _VARIABLES):
        yield Ranks(choose_device(device))
        return
    where = device_of_process(
        device,
        local_rank=_variable("LOCAL_RANK", 0),
        local_size=_variable("LOCAL_WORLD_SIZE", 1),
    )
    size = _variable("WORLD_SIZE", 1, at_least=1)
    _variable("RANK", 0, below=size)
    _variable("MASTER_PORT", 0, below=1 << 16)
    timeout = timedelta(seconds=timeout_s)
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
    except dist.DistError as error:
        first = ":".join(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise RankLost(
            f"rank {os.environ['RANK']} stops: it met no other process at {first} within "
            f"{timeout_s:g} s; start all processes, and give all the address of rank 0 and a port "
            f"there that is free."
        ) from error
    start = _variable("TORCHELASTIC_RESTART_COUNT", 0)
    # torchrun keeps its store over a restart, and with it the addresses of processes that ended.
    fresh = PrefixStore(f"start {start}", store)
    backend = "gloo"
    if where.type == "cuda":
        torch.cuda.set_device(where)
        backend = "cpu:gloo,cuda:nccl"  # counts and objects go over gloo, which names no GPU
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=timeout)
    try:
        local = _variable("LOCAL_WORLD_SIZE", size, at_least=1)
        yield Ranks(
            where,
            rank=rank,
            size=size,
            timeout_s=timeout_s,
            store=store,
            start=start,
            machines=1 if size % local else size // local,
        )
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()


def _variable(name: str, default: int, *, at_least: int = 0, below: int = 1 << 31) -> int:
    """An integer from the environment, as torchrun sets it."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or not at_least <= int(text) < below:
        raise ValueError(
            f"the environment has {name}={text!r}; it must be an integer from {at_least} to "
            f"{below - 1}, as torchrun sets it, so start with torchrun, or unset {name}."
        )
    return int(text)


def _is_of_ring(error: BaseException) -> bool:
    """Whether dilated-ring, where it is in use, found that another rank holds this one up."""
    ring = sys.modules.get("dilated_ring.transport.errors")
    return ring is not None and isinstance(error, ring.RankFailure)


def _portable(error: Exception) -> Exception:
    """The error as another process can read it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an error may hold anything
        return RuntimeError(f"{type(error).__name__}: {error}")


def _is_of_communication(error: BaseException) -> bool:
    """Whether an error only tells that another process did not do its part."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and _OF_COMMUNICATION.search(str(error)) is not None
    )
