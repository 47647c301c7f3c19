"""How much memory a run takes and how many validations it can bear, before it begins."""

from __future__ import annotations

import torch
from dilated_core.cross_entropy import chunk_tokens

from dilated_models.config import LongNetConfig
from dilated_models.longnet.size import check_memory, least_parameters, model_bytes, num_blocks
from dilated_models.training.config import TrainingConfig
from dilated_models.training.out_of_memory import (
    Measure,
    after_measure,
    check_policy,
    take_measure,
)

_ADAM_BYTES = 8  # two float32 per parameter
FORWARD_SHARE = 3  # a forward takes a third of the time of a training step
_VALIDATION_SHARE = 4  # validations may take a quarter of the time of the training


def training_bytes(
    model: LongNetConfig, training: TrainingConfig, *, cp: int = 1, shards: int = 1
) -> int:
    """The least memory that a run takes on a rank: weights, Adam's means, gradients or activations.

    `cp` ranks share the positions of each row, and `shards` the weights and all that is kept of
    each.

    The activations are those that autograd keeps for the backward pass of one part of a batch.
    Their number per token was counted with `saved_tensors_hooks`.
    """
    tokens = training.batch_size // training.accumulation * training.seq_len // cp
    width, hidden = model.d_model, model.dim_feedforward
    block = 7 * width + 2 * model.kv_dim + 2 * hidden + model.nhead
    if model.activation != "relu":
        block += hidden
    if model.positions == "alibi":
        # Eight more channels of each head of q, k, v and out.
        block += 8 * (2 * model.nhead + 2 * (model.num_kv_heads or model.nhead))
    block += model.key_conv * width  # the inputs of each product, masked between documents
    if model.dropout:
        block += 2 * width + 2 * hidden
    layers = num_blocks(model)
    kept = layers * width + block if model.activation_checkpointing else layers * block
    if model.num_encoder_layers:
        # Input, its LayerNorm, q and out; k, v and lse. With the states of the encoder.
        cross = 4 * width + 2 * model.kv_dim + model.nhead + (width if model.dropout else 0)
        kept += cross * (1 if model.activation_checkpointing else model.num_decoder_layers)
        kept += 2 * width
    values = tokens * (kept + 3 * width)  # with the gradient of what the output layer scores
    logits = min(tokens, chunk_tokens(model.num_tokens)) * model.num_tokens
    activations = values * (2 if training.dtype == "bfloat16" else 4) + 3 * 4 * logits
    parameters = least_parameters(model) // shards
    weights = model_bytes(model)  # made whole on each rank before they are spread
    return max(
        weights,
        weights // shards + _ADAM_BYTES * parameters + max(4 * parameters, activations),
    )


def fit_memory(
    model: LongNetConfig,
    training: TrainingConfig,
    device: torch.device,
    *,
    num_processes: int = 1,
    cp: int = 1,
    shards: int = 1,
) -> list[Measure]:
    """The measures of the run's policy after which it may fit into the memory that there is.

    Args:
        model, training: The run.
        device: Whose memory counts.
        num_processes: Of the run; of several, none may take a measure alone.
        cp, shards: As of `training_bytes`.

    Raises:
        ValueError: If the run cannot fit, or several processes have a policy.
    """
    check_policy(training, num_processes=num_processes)
    measures: list[Measure] = []
    while True:
        try:
            check_memory(
                training_bytes(model, training, cp=cp, shards=shards),
                f"training with batch_size {training.batch_size}, seq_len {training.seq_len} and "
                f"{model.num_decoder_layers} layers",
                device,
                "use a smaller seq_len or model, more accumulation, or activation_checkpointing",
            )
        except ValueError as error:
            measure = take_measure(model, training, step=0, error=error)
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
