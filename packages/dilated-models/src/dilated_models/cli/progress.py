"""A progress bar on a terminal; elsewhere, a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn

from dilated_models.training.duration import StepTimes
from dilated_models.training.evaluation import Evaluation
from dilated_models.training.loop import StepRecord

_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHING = 0.1  # weight of the newest step in the shown loss and rate


class _PlainConsole(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error; rich would end the process, and a run could not save its state."""
        raise


def plain_console(*, stderr: bool = False, is_quiet: bool = False) -> Console:
    """A console that prints text as it is: a path may hold `[b]` or `:smile:`, which rich reads."""
    return _PlainConsole(
        stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True, quiet=is_quiet
    )


class Progress:
    """A bar on a terminal; elsewhere, a line every ten seconds.

    Args:
        console: Prints the bar or the lines.
        unit: What is counted.
        has_finished_bar: Whether the bar stays on the terminal when the work has ended.
        total: Number of all, if known.
        done: Number of those done before.
    """

    def __init__(
        self,
        console: Console,
        unit: str,
        *,
        has_finished_bar: bool,
        total: int | None = None,
        done: int = 0,
    ) -> None:
        self.console = console
        self._unit = unit
        self._last_line = time.monotonic()
        self._bar = rich.progress.Progress(
            TextColumn(unit + " {task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TextColumn("{task.fields[what]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
            transient=not has_finished_bar,
        )
        self._task = self._bar.add_task("", total=total, completed=done, numbers="", what="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def busy(self, what: str) -> None:
        """Show the work between two counts, on a terminal."""
        self._bar.update(self._task, what=what)

    def show(
        self,
        done: int,
        total: int,
        *,
        seconds_left: float,
        numbers: str = "",
        at_once: bool = False,
    ) -> None:
        """Show how much is done.

        Args:
            done: Number of those done.
            total: Number of all.
            seconds_left: Time that the others take.
            numbers: More to show.
            at_once: Whether a line does not wait for ten seconds to pass.
        """
        numbers = " · ".join([*filter(None, [numbers]), f"{_clock(seconds_left)} left"])
        self._bar.update(self._task, completed=done, total=total, numbers=numbers, what="")
        now = time.monotonic()
        if self._bar.disable and (at_once or now - self._last_line >= _SECONDS_BETWEEN_LINES):
            self._last_line = now
            self.console.print(f"{self._unit} {done}/{total} · {numbers}")


class TrainingProgress(Progress):
    """Shows the progress of a run: step, bits per byte, tokens/s, peak memory, time left.

    Args:
        console: As for `Progress`.
        steps: Number of all steps.
        done: Number of steps that an earlier part of the run did.
        times: Estimates the time of the steps to come.
        scorable: Length of the validation text, in tokens.
        peak_memory_bytes: Returns the most memory used so far.
        available_bytes: Returns how much memory is left, or None where nobody knows.
        is_stopping: Returns whether a signal has arrived. Ctrl-C ends `tee` behind a pipe, too, and
            a hang-up comes from a terminal that is gone. So from then on a line that nobody takes
            is no error: the run must save its state first.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        done: int,
        times: StepTimes,
        scorable: int,
        peak_memory_bytes: Callable[[], int],
        available_bytes: Callable[[], int | None],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(console, "step", has_finished_bar=True, total=steps, done=done)
        self._is_stopping = is_stopping
        self._steps = steps
        self._done = done
        self._times = times
        self._scorable = scorable
        self._peak_memory_bytes = peak_memory_bytes
        self._available_bytes = available_bytes
        self._bits_per_byte: float | None = None
        self._seconds_per_token: float | None = None

    def __exit__(self, *raised: Any) -> None:
        with self._lines():
            super().__exit__(*raised)

    @contextmanager
    def _lines(self) -> Generator[None]:
        """The block prints; that fails without an error when the run is stopping."""
        try:
            yield
        except OSError:
            if not self._is_stopping():
                raise

    def stepped(self, record: StepRecord) -> None:
        """Show one more step; after the second one, print what the run takes."""
        with self._lines():
            self._show_step(record)

    def _show_step(self, record: StepRecord) -> None:
        self._bits_per_byte = _blend(self._bits_per_byte, record.bits_per_byte)
        self._seconds_per_token = _blend(
            self._seconds_per_token, record.seconds / record.num_tokens
        )
        numbers = (
            f"{self._bits_per_byte:.3f} bits/byte · {1 / self._seconds_per_token:,.0f} tokens/s · "
            f"{self._peak_memory_bytes() / 2**20:,.0f} MiB"
        )
        self.show(
            record.step,
            self._steps,
            seconds_left=self._times.left(record.step, scorable=self._scorable),
            numbers=numbers,
            at_once=record.step in (1, self._steps),
        )
        # The first step compiles and allocates.
        if record.step == min(self._done + 2, self._steps):
            self.console.print(self._whole_run(record.step))

    def _whole_run(self, step: int) -> str:
        """What the run takes: time and memory, and options for less memory."""
        peak, available = self._peak_memory_bytes(), self._available_bytes()
        left = self._times.left(step, scorable=self._scorable)
        line = (
            f"about {self._times.longest:.2g} s per step with windows of full length, "
            f"{_clock(left)} to the end, and {peak / 2**30:.1f} GiB of memory"
        )
        if available is not None and peak > available:
            line += (
                f", which leaves {available / 2**30:.1f} GiB; it takes less with "
                f"--accumulation, --checkpoint-activations or a smaller --seq-len"
            )
        return line

    def announce(self, text: str) -> None:
        """Print what a user should read, without control characters."""
        with self._lines():
            self.console.print(printable(text))

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """Print the loss on the validation text."""
        line = f"step {step}: validation {evaluation.bits_per_byte:.3f} bits per byte"
        with self._lines():
            self.console.print(line)


class ScoringProgress(Progress):
    """Shows how much of a text is scored.

    Args:
        console: As for `Progress`.
    """

    def __init__(self, console: Console) -> None:
        super().__init__(console, "scored tokens", has_finished_bar=False)
        self._began = time.monotonic()

    def scored(self, done: int, total: int) -> None:
        """Show the number of tokens scored so far."""
        if done:
            seconds = time.monotonic() - self._began
            self.show(done, total, seconds_left=seconds * (total - done) / done)


def printable(text: str) -> str:
    """The text without control characters, which would command a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _blend(mean: float | None, newest: float) -> float:
    return newest if mean is None else (1 - _SMOOTHING) * mean + _SMOOTHING * newest


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
