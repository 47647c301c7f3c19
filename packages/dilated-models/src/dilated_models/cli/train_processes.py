"""Run `dilated train` on the processes that there are, and name the way to go on at every end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import typer

from dilated_models.cli.errors import exit_code
from dilated_models.cli.shell import train_command

if TYPE_CHECKING:
    from rich.console import Console

    from dilated_models.training.deepspeed import DeepSpeedConfig
    from dilated_models.training.loop import TrainingState
    from dilated_models.training.ranks import Ranks
    from dilated_models.training.run import Report, Run
    from dilated_models.training.tokens import Text


class Parallel(NamedTuple):
    """How the processes of a run divide its work: no part of the run, which others may continue."""

    device: str
    cp: int
    fsdp: bool
    file: DeepSpeedConfig | None
    timeout_s: float
    compiler: str | None

    def spreads_weights(self, size: int) -> bool:
        """Whether FSDP2 is used on this many processes."""
        return self.fsdp or (self.file is not None and self.file.stage > 0 and size > 1)

    def options(self, size: int) -> list[str]:
        """The options that continue a run on this many processes as these began it."""
        from dilated_models.training.ranks import TIMEOUT_S

        return [
            *(["--cp", str(self.cp)] if self.cp > 1 else []),
            *(["--fsdp"] if self.spreads_weights(size) else []),
            *(["--compile"] if self.compiler is not None else []),
            *(["--timeout", f"{self.timeout_s:g}"] if self.timeout_s != TIMEOUT_S else []),
            *(["--device", self.device] if self.device != "auto" else []),
        ]


def train_with(make: Callable[[Ranks], tuple[Run, bool]], parallel: Parallel, began: float) -> None:
    """Join the other processes, if there are any, and train with them."""
    from dilated_models.cli.progress import plain_console
    from dilated_models.cli.train_summary import conclude
    from dilated_models.training.folder import hold
    from dilated_models.training.grid import check_grid, parts_of_rank
    from dilated_models.training.ranks import joined
    from dilated_models.training.setup import same_run

    with joined(parallel.device, timeout_s=parallel.timeout_s) as ranks:

        def checked() -> tuple[Run, bool]:
            check_grid(ranks.size, cp=parallel.cp, fsdp=parallel.fsdp)
            run, is_new = make(ranks)
            numbers = run.training
            parts_of_rank(numbers.batch_size, numbers.accumulation, ranks.size // parallel.cp)
            return run, is_new

        try:
            with contextlib.ExitStack() as stack:
                with ranks.naming_the_missing():
                    run, is_new = ranks.together(checked)
                    run = same_run(run, ranks)
                    ranks.first(lambda: stack.enter_context(hold(run.folder, is_new=is_new)))
                console = plain_console(is_quiet=not ranks.is_first)
                report = _run(console, run, ranks, parallel, is_new=is_new)
        except Exception as error:
            if ranks.tells(error):
                raise
            raise typer.Exit(exit_code(error)) from None
    if report is not None:
        conclude(console, run, report, time.monotonic() - began)


def _run(
    console: Console, run: Run, ranks: Ranks, parallel: Parallel, *, is_new: bool
) -> Report | None:
    """Build the model, train it and show the progress; every end names the way to go on."""
    from dilated_models.cli.train_summary import introduce
    from dilated_models.training.checkpoints import has_checkpoint, restore_checkpoint
    from dilated_models.training.over_ranks import OverRanks
    from dilated_models.training.run import build
    from dilated_models.training.stopping import Stopped
    from dilated_models.training.tokens import open_text

    cp, fsdp = parallel.cp, parallel.spreads_weights(ranks.size)
    options = parallel.options(ranks.size)
    again = train_command(
        "--resume", "--out", run.folder, *options, processes=ranks.size, machines=ranks.machines
    )
    go_on = f"continue with: {again}"
    is_whole = is_new  # a checkpoint of an earlier process may be damaged
    try:
        with ranks.naming_the_missing():
            over = None
            if ranks.size > 1:
                over = ranks.together(lambda: OverRanks(ranks, cp=cp, fsdp=fsdp))
            state = build(run, over, compiler=parallel.compiler)
            if not is_new:
                restore_checkpoint(state, run.folder, run_id=run.run_id, ranks=ranks)
                is_whole = True
            text = open_text(run, console.print, ranks)
            introduce(console, run, state, parallel.file)
            return _execute(console, run, state, text, ranks)
    except Stopped as stopped:
        with contextlib.suppress(OSError):  # the signal may have ended what shows this, too
            console.print(f"{stopped}; everything is saved; {go_on}")
        raise typer.Exit(stopped.exit_code) from None
    except (Exception, KeyboardInterrupt) as error:
        if is_whole and has_checkpoint(run.folder):
            error.add_note(f"the last checkpoint is whole; {go_on}")
        raise


def _execute(
    console: Console, run: Run, state: TrainingState, text: Text, ranks: Ranks
) -> Report | None:
    from dilated_models.cli.progress import TrainingProgress
    from dilated_models.longnet.size import available_bytes, peak_memory_bytes
    from dilated_models.training.run import execute
    from dilated_models.training.stopping import StopSignals

    # Ctrl-C reaches torchrun and perhaps its processes, to which torchrun passes it on.
    seconds_apart = 0.0 if ranks.size == 1 else 2.0
    signals = StopSignals(is_silent=not ranks.is_first, seconds_apart=seconds_apart)
    progress = TrainingProgress(
        console,
        steps=run.training.steps,
        done=state.step,
        times=state.times,
        scorable=len(text.validation),
        peak_memory_bytes=lambda: peak_memory_bytes(run.device),
        available_bytes=lambda: available_bytes(run.device),
        is_stopping=lambda: signals.received is not None,
    )
    with signals, progress:
        return execute(run, text, state, progress, signals, ranks)
