"""How much memory a run takes and how many validations it can bear, before it begins."""

from __future__ import annotations

import torch

from dilated_models.config import LongNetConfig
from dilated_models.longnet.size import check_memory, count_parameters, model_bytes
from dilated_models.planning.job import Job
from dilated_models.planning.memory import memory_of
from dilated_models.training.config import TrainingConfig
from dilated_models.training.grid import parts_of_rank
from dilated_models.training.out_of_memory import Measure, after_measure, take_measure

FORWARD_SHARE = 3  # a forward takes a third of the time of a training step
_VALIDATION_SHARE = 4  # validations may take a quarter of the time of the training
_SURE_SHARE = 0.9  # plans are within a fifth of what was measured, most within a twentieth


def training_bytes(
    model: LongNetConfig,
    training: TrainingConfig,
    *,
    dp: int = 1,
    cp: int = 1,
    shards: int = 1,
    on_gpu: bool = False,
) -> int:
    """The least memory that a run takes on a rank: nine tenths of what `dilated plan` computes.

    Args:
        model: The model.
        training: The numbers of the run.
        dp: Ranks that have rows of their own.
        cp: Ranks that share the positions of each row.
        shards: Ranks over which the weights, and all that is kept of each, are spread.
        on_gpu: Whether the rank computes on a GPU.
    """
    devices = max(cp, shards)
    rows = (
        training.batch_size // dp // parts_of_rank(training.batch_size, training.accumulation, dp)
    )
    job = Job(
        model=model,
        seq_len=training.seq_len,
        batch_size=rows * (devices // cp) * training.accumulation,
        accumulation=training.accumulation,
        dtype="bfloat16" if training.dtype == "bfloat16" else "float32",
        devices=devices,
        cp=cp,
        fsdp=shards > 1,
        on_gpu=on_gpu,
    )
    objects = model_bytes(model) - 4 * count_parameters(model).total
    return round(_SURE_SHARE * (memory_of(job).total + objects))


def fit_memory(
    model: LongNetConfig,
    training: TrainingConfig,
    device: torch.device,
    *,
    dp: int = 1,
    cp: int = 1,
    shards: int = 1,
) -> list[Measure]:
    """The measures of the run's policy after which it may fit into the memory that there is.

    Args:
        model, training: The run.
        device: Whose memory counts.
        dp, cp, shards: As of `training_bytes`.

    Raises:
        ValueError: If the run cannot fit.
    """
    measures: list[Measure] = []
    while True:
        try:
            check_memory(
                training_bytes(
                    model, training, dp=dp, cp=cp, shards=shards, on_gpu=device.type != "cpu"
                ),
                f"training with batch_size {training.batch_size}, seq_len {training.seq_len} and "
                f"{model.num_decoder_layers} layers",
                device,
                "use a smaller seq_len or model, more accumulation, or activation_checkpointing",
            )
        except ValueError as error:
            measure = take_measure(model, training, step=0, error=error, dp=dp)
            if measure is None:
                raise
            model, training = after_measure(model, training, measure)
            measures.append(measure)
        else:
            return measures


def most_validation_tokens(steps: int, *, batch_size: int, seq_len: int) -> int:
    """Tokens that a run of so many steps may score, so that validation does not dominate it.

    Example:
        >>> most_validation_tokens(100, batch_size=2, seq_len=1000)
        150000
    """
    return max(seq_len, steps * batch_size * seq_len * FORWARD_SHARE // _VALIDATION_SHARE)
