"""Ctrl-C, SIGTERM and SIGHUP end a command, and a training loop after it has saved its state."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_SECONDS_BETWEEN_STOPS = 1.0


class Stopped(Exception):  # noqa: N818 - no error: the run did what the signal requests
    """Raised by a run that has received a signal and has saved its state.

    Attributes:
        exit_code: 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.
        step: Steps done.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.exit_code = 128 + signal_number
        self.step = step


class StoppedAtOnce(KeyboardInterrupt):
    """Raised inside whatever runs when a signal arrives, in training the second; saves nothing.

    Attributes:
        exit_code: As of `Stopped`.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped at once by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class _StopAtOnce:
    """A signal handler that raises `StoppedAtOnce`, but once in a second at most.

    Keys that are pressed in a row must not disturb the removal of half files. Later ones must
    count: Python drops an exception that is raised inside a finaliser.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_STOPS:
            self._last = time.monotonic()
            raise StoppedAtOnce(number)


@contextmanager
def stopping_at_once() -> Generator[None]:
    """In the block, Ctrl-C, SIGTERM and SIGHUP raise `StoppedAtOnce`."""
    previous = _handle(_StopAtOnce())
    try:
        yield
    finally:
        _give_back(previous)


class StopSignals:
    """In its `with` block, the first Ctrl-C, SIGTERM or SIGHUP is recorded; a second one stops.

    Outside the main thread, where Python allows no signal handlers, no signal is recorded.

    Args:
        is_silent: Whether the answer to the first signal is not printed.
        seconds_apart: Least time between the first signal and a second one. Ctrl-C reaches torchrun
            and its processes, and torchrun passes it on to them.

    Attributes:
        received: Number of the recorded signal, or None.
    """

    def __init__(self, *, is_silent: bool = False, seconds_apart: float = 0.0) -> None:
        self.received: int | None = None
        self._is_silent = is_silent
        self._seconds_apart = seconds_apart
        self._received_at = -math.inf
        self._stop_at_once = _StopAtOnce()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._previous = _handle(self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _give_back(self._previous)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            if time.monotonic() - self._received_at >= self._seconds_apart:
                self._stop_at_once(number, frame)
            return
        self.received = number
        self._received_at = time.monotonic()
        if self._is_silent:
            return
        # print could meet a print that the signal has interrupted, which Python refuses.
        with contextlib.suppress(OSError):
            os.write(2, b"\ndilated: stopping after this step; again to stop now\n")


def _handle(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Handle the signals, in the main thread only; return the handlers before.

    SIGHUP stays ignored where it is: `nohup` lets a command outlive its terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = [signal.SIGINT, signal.SIGTERM]
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    return {number: signal.signal(number, handler) for number in numbers}


def _give_back(previous: dict[int, Any]) -> None:
    for number, handler in previous.items():
        signal.signal(number, handler)
