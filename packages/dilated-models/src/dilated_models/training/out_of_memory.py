"""What a run does when a step does not fit into memory: stop, or take a measure that it records.

A measure changes how a step is computed and not what it computes: the batch, its loss and its
gradient are the same up to rounding. (With dropout, parts of another size draw other masks.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dilated_models.config import LongNetConfig
    from dilated_models.training.config import TrainingConfig

POLICIES = ("stop", "halve", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure against the lack of memory.

    Attributes:
        step: Steps done before it.
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

    def __str__(self) -> str:
        did = (
            f"computes each batch in {self.accumulation} parts"
            if self.policy == "halve"
            else "recomputes each block in the backward pass"
        )
        return f"out of memory after step {self.step} ({self.error}); from now on the run {did}"


def check_policy(training: TrainingConfig, *, num_processes: int) -> None:
    """Refuse a policy on several processes.

    Raises:
        ValueError: If there are several and the policy is not `"stop"`.
    """
    if num_processes > 1 and training.on_out_of_memory != "stop":
        raise ValueError(
            f"on_out_of_memory is {training.on_out_of_memory!r} and there are {num_processes} "
            f"processes; it must be 'stop' there, because the others wait for the one that has run "
            f"out, so use more accumulation or activation_checkpointing instead."
        )


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
    model: LongNetConfig, training: TrainingConfig, *, step: int, error: BaseException
) -> Measure | None:
    """The next measure of the run's policy; None if it has none left.

    Example:
        `"halve"` with `batch_size` 12 and `accumulation` 2, 4 and 6: then 4, 12 and 12 parts.
    """
    rows = training.batch_size
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= 200 else text[:197] + "..."
    accumulation, recomputes = training.accumulation, model.activation_checkpointing
    if training.on_out_of_memory == "halve" and accumulation < rows:
        accumulation = next(n for n in range(2 * accumulation, rows + 1) if rows % n == 0)
    elif training.on_out_of_memory == "checkpoint" and not recomputes:
        recomputes = True
    else:
        return None
    return Measure(
        step=step,
        policy=training.on_out_of_memory,
        accumulation=accumulation,
        activation_checkpointing=recomputes,
        error=text,
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
