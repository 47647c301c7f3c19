"""What a run does when a step does not fit into memory: stop, or take a measure that it records.

A measure changes how a step is computed and not what it computes: the batch, its loss and its
gradient are the same up to rounding. (With dropout, parts of another size draw other masks.)

One process begins the step anew. Of several, the others wait for what the one that has run out
would send, so it leaves the measure for the next start of all processes, and ends them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from dilated_core.atomic_write import write_atomically

from dilated_models.training.failures import NeedsRestart
from dilated_models.training.grid import parts_of_rank

if TYPE_CHECKING:
    from dilated_models.config import LongNetConfig
    from dilated_models.training.config import TrainingConfig
    from dilated_models.training.ranks import Ranks

POLICIES = ("stop", "halve", "checkpoint")
MEASURE_FILE = "out_of_memory.json"


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure against the lack of memory.

    Attributes:
        step: Steps done before the first one that it changes.
        policy: `"halve"` or `"checkpoint"`.
        accumulation: Parts in which a batch is computed from then on.
        activation_checkpointing: Whether blocks are recomputed from then on.
        error: What did not fit, in one line.
    """

    step: int
    policy: str
    accumulation: int
    activation_checkpointing: bool
    error: str

    @property
    def effect(self) -> str:
        """What the run does from then on."""
        if self.policy == "halve":
            return f"the run computes each batch in {self.accumulation} parts"
        return "the run recomputes each block in the backward pass"

    def __str__(self) -> str:
        return f"out of memory ({self.error}); after step {self.step} {self.effect}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of PyTorch, of a device or of the CPU, or Python's had no memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    # The CPU's allocator raises a RuntimeError: "DefaultCPUAllocator: can't allocate memory".
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )


def take_measure(
    model: LongNetConfig,
    training: TrainingConfig,
    *,
    step: int,
    error: BaseException,
    dp: int = 1,
) -> Measure | None:
    """The next measure of the run's policy; None, with a note on the error, if it has none left.

    Args:
        model, training: The run.
        step: Steps done.
        error: What did not fit.
        dp: Ranks that have rows of their own. A rank may have few rows of the batch, and its parts
            must become smaller.

    Example:
        `"halve"` with `batch_size` 12 and `accumulation` 2, 4 and 6: then 4, 12 and 12 parts.
    """
    if training.on_out_of_memory == "stop":
        return None
    rows = training.batch_size
    accumulation, recomputes = training.accumulation, model.activation_checkpointing
    if training.on_out_of_memory == "halve":
        parts = parts_of_rank(rows, accumulation, dp)
        more = [
            n
            for n in range(2 * accumulation, rows + 1)
            if rows % n == 0 and parts_of_rank(rows, n, dp) > parts
        ]
        if not more:
            other = "" if recomputes else "continue with --on-out-of-memory checkpoint, or "
            error.add_note(
                f"a part has one row already; {other}use more processes with --cp or --fsdp"
            )
            return None
        accumulation = more[0]
    elif recomputes:
        error.add_note(
            "each block is recomputed already; continue with --on-out-of-memory halve, or use more "
            "processes with --cp or --fsdp"
        )
        return None
    else:
        recomputes = True
    text = " ".join(str(error).split()) or type(error).__name__
    return Measure(
        step=step,
        policy=training.on_out_of_memory,
        accumulation=accumulation,
        activation_checkpointing=recomputes,
        error=text if len(text) <= 200 else text[:197] + "...",
    )


def after_measure(
    model: LongNetConfig, training: TrainingConfig, measure: Measure
) -> tuple[LongNetConfig, TrainingConfig]:
    """The configurations from a measure on."""
    recomputes = measure.activation_checkpointing
    return (
        dataclasses.replace(model, activation_checkpointing=recomputes),
        dataclasses.replace(training, accumulation=measure.accumulation),
    )


def leave_measure(measure: Measure, ranks: Ranks) -> NeedsRestart:
    """Leave a measure for the next start of all ranks: in the run's folder, if there is a run.

    Without one, it is left at the launcher, which starts the ranks again.

    Returns:
        The error with which this rank must end.
    """
    text = json.dumps(dataclasses.asdict(measure), indent=2) + "\n"
    when = "when all processes start again"
    if ranks.folder is None:
        ranks.leave_note(text)
        when = "when torchrun starts all processes again (--max-restarts)"
    else:
        with write_atomically(ranks.folder / MEASURE_FILE) as part:
            part.write_text(text, "utf-8")
    return NeedsRestart(f"out of memory ({measure.error}); {when}, {measure.effect}")


def left_measure(folder: Path, ranks: Ranks) -> Measure | None:
    """The measure that a rank left before it ended, if there is one.

    Raises:
        ValueError: If its file is damaged.
    """
    path = folder / MEASURE_FILE
    text = path.read_text("utf-8") if path.exists() else ranks.left_note()
    if text is None:
        return None
    try:
        fields: dict[str, Any] = json.loads(text)
        return Measure(**fields)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} is damaged ({error}); remove it, and give --on-out-of-memory again."
        ) from error
