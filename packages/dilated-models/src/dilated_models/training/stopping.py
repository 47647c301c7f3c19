"""Ctrl-C and SIGTERM stop the training loop between two steps, after it has saved its state."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):  # noqa: N818 - no error: the run did what the signal requests
    """Raised by a run that has received a signal and has saved its state.

    Attributes:
        exit_code: 128 + the signal's number: 130 for Ctrl-C, 143 for SIGTERM.
        step: Steps done.
    """

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} after step {step}")
        self.exit_code = 128 + signal_number
        self.step = step


class StoppedAtOnce(KeyboardInterrupt):
    """Raised inside whatever runs when a second signal arrives; no more is saved.

    Attributes:
        exit_code: As of `Stopped`.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped at once by {signal.Signals(signal_number).name}")
        self.exit_code = 128 + signal_number


class StopSignals:
    """In its `with` block, the first Ctrl-C or SIGTERM is recorded; the second stops at once.

    Outside the main thread, where Python allows no signal handlers, no signal is recorded.

    Attributes:
        received: Number of the recorded signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            for each in self._previous:  # a third signal must not disturb the removal of half files
                signal.signal(each, signal.SIG_IGN)
            raise StoppedAtOnce(number)
        self.received = number
        # print could meet a print that the signal has interrupted, which Python refuses.
        with contextlib.suppress(OSError):
            os.write(2, b"\ndilated: stopping after this step; again to stop now\n")
