"""A progress bar on a terminal; elsewhere, a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from dilated_models.training.evaluation import Evaluation
from dilated_models.training.loop import StepRecord

_SECONDS_BETWEEN_LINES = 10.0
_SMOOTHING = 0.1  # weight of the newest step in the shown loss and rate


def plain_console(*, stderr: bool = False) -> Console:
    """A console that prints text as it is: a path may hold `[b]` or `:smile:`, which rich reads."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)


class TrainingProgress:
    """Shows the progress of a run: step, bits per byte, tokens/s, peak memory, time left.

    Args:
        console: Prints the lines. If it is no terminal, a line every ten seconds replaces the bar.
        steps: Number of all steps.
        done: Number of steps that an earlier part of the run did.
        peak_memory_bytes: Returns the most memory used so far.
        available_bytes: Returns how much memory is left, or None where nobody knows.
    """

    def __init__(
        self,
        console: Console,
        *,
        steps: int,
        done: int,
        peak_memory_bytes: Callable[[], int],
        available_bytes: Callable[[], int | None],
    ) -> None:
        self._console = console
        self._steps = steps
        self._peak_memory_bytes = peak_memory_bytes
        self._available_bytes = available_bytes
        self._bits_per_byte: float | None = None
        self._seconds_per_token: float | None = None
        self._last_line = time.monotonic()
        self._records = 0
        self._bar = Progress(
            TextColumn("step {task.completed}/{task.total}", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[what]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(
            "train", total=steps, completed=done, numbers="", what="starting"
        )

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def stepped(self, record: StepRecord) -> None:
        """Show one more step; after the second one, print what the whole run takes."""
        self._bits_per_byte = _blend(self._bits_per_byte, record.bits_per_byte)
        self._seconds_per_token = _blend(
            self._seconds_per_token, record.seconds / record.num_tokens
        )
        numbers = (
            f"{self._bits_per_byte:.3f} bits/byte · {1 / self._seconds_per_token:,.0f} tokens/s · "
            f"{self._peak_memory_bytes() / 2**20:,.0f} MiB"
        )
        self._bar.update(self._task, completed=record.step, numbers=numbers, what="")
        now = time.monotonic()
        is_first_or_last = record.step in (1, self._steps)
        if self._bar.disable and (
            is_first_or_last or now - self._last_line >= _SECONDS_BETWEEN_LINES
        ):
            self._last_line = now
            left = (self._steps - record.step) * record.num_tokens * self._seconds_per_token
            self._print(f"step {record.step}/{self._steps} · {numbers} · {_clock(left)} left")

        self._records += 1
        # The first step compiles and allocates, so the second one tells how long the others take.
        if self._records == min(2, self._steps):
            peak, available = self._peak_memory_bytes(), self._available_bytes()
            line = (
                f"about {record.seconds:.2g} s per step, {_clock(self._steps * record.seconds)} in "
                f"all, and {peak / 2**30:.1f} GiB of memory"
            )
            if available is not None and peak > available:
                line += (
                    f", which leaves {available / 2**30:.1f} GiB; it takes less with "
                    f"--accumulation, --checkpoint-activations or a smaller --seq-len"
                )
            self._print(line)

    def validated(self, step: int, evaluation: Evaluation) -> None:
        """Print the loss on the validation text."""
        self._print(f"step {step}: validation {evaluation.bits_per_byte:.3f} bits per byte")

    def busy(self, what: str) -> None:
        """Show the work between two steps."""
        self._bar.update(self._task, what=what)

    def _print(self, line: str) -> None:
        self._console.print(line)


class ScoringProgress:
    """Shows how much of a text is scored: a bar on a terminal; elsewhere, a line every ten seconds.

    Args:
        console: Prints the lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("scored {task.completed}/{task.total} tokens", markup=False),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("evaluate", total=None)

    def __enter__(self) -> ScoringProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def scored(self, done: int, total: int) -> None:
        """Show the number of tokens scored so far."""
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        if self._bar.disable and done and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (now - self._began) * (total - done) / done
            self._console.print(f"scored {done}/{total} tokens · {_clock(left)} left")


def _blend(mean: float | None, newest: float) -> float:
    return newest if mean is None else (1 - _SMOOTHING) * mean + _SMOOTHING * newest


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
