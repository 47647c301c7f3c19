"""Run processes side by side until they end or a deadline comes, showing their output as it comes.

A kernel that hangs or takes the device down ends one process and not the run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEPT_LINES = 30
TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class Job:
    """One process: what to call it in the output, and how to start it."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    folder: Path


@dataclass(slots=True)
class Outcome:
    """How a process ended.

    Attributes:
        name: That of the job.
        exit_code: None if it was cut off at the deadline.
        seconds: How long it ran.
        tail: The last lines of its output.
    """

    name: str
    exit_code: int | None = None
    seconds: float = 0.0
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))

    @property
    def problem(self) -> str | None:
        """What there is to say against it, in one sentence."""
        if self.exit_code == 0:
            return None
        last = next((line for line in reversed(self.tail) if line.strip()), "no output")
        if self.exit_code is None:
            return f"{self.name} was cut off after {self.seconds:.0f} s; last output: {last}"
        return f"{self.name} ended with code {self.exit_code}; last output: {last}"


def run_jobs(
    jobs: Sequence[Job],
    *,
    seconds: float,
    show: Callable[[str], None],
    each_tick: Callable[[], None],
) -> list[Outcome]:
    """Run all jobs at once, and kill what still runs after `seconds`.

    Args:
        jobs: What to run.
        seconds: Limit for all of them.
        show: Called with each line of output.
        each_tick: Called again and again while they run.
    """
    start = time.monotonic()
    running: list[tuple[subprocess.Popen[str], threading.Thread, Outcome]] = []
    outcomes: list[Outcome] = []
    try:
        for job in jobs:
            process = subprocess.Popen(
                job.command,
                cwd=job.folder,
                env=dict(job.environment),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                process_group=0,  # to end it with all that it started
            )
            outcome = Outcome(job.name)
            thread = threading.Thread(target=_follow, args=(process, outcome, show), daemon=True)
            thread.start()
            running.append((process, thread, outcome))
            outcomes.append(outcome)
        while running:
            each_tick()
            is_over = time.monotonic() - start > seconds
            for entry in list(running):
                process, thread, outcome = entry
                if is_over and process.poll() is None:
                    _kill(process)
                elif process.poll() is None:
                    continue
                else:
                    outcome.exit_code = process.returncode
                outcome.seconds = time.monotonic() - start
                # Its own children may hold the pipe open, so do not wait for the end of it forever.
                thread.join(timeout=2)
                running.remove(entry)
            if running:
                time.sleep(TICK_S)
    finally:
        for process, thread, _ in running:
            _kill(process)
            thread.join(timeout=2)
    each_tick()
    return outcomes


def _follow(process: subprocess.Popen[str], outcome: Outcome, show: Callable[[str], None]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            outcome.tail.append(line.rstrip())
            show(f"{outcome.name} | {line.rstrip()}")


def _kill(process: subprocess.Popen[str]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself meanwhile
    process.wait()
