"""A run is refused before it begins only if it cannot fit."""

import dataclasses

import pytest
import torch
from dilated_models.planning.job import Job
from dilated_models.planning.memory import memory_of
from dilated_models.training.config import TrainingConfig
from dilated_models.training.cost import fit_memory, training_bytes

TRAINING = TrainingConfig(
    steps=10, batch_size=4, accumulation=2, seq_len=256, learning_rate=1e-3, warmup_steps=1,
    validate_every=1, checkpoint_every=1,
)  # fmt: skip


def test_a_little_less_than_the_plan_is_needed(config):
    planned = memory_of(Job(model=config, seq_len=256, batch_size=4, accumulation=2)).total
    assert 0.8 * planned < training_bytes(config, TRAINING) < planned


def test_ranks_that_share_rows_or_weights_take_less(config):
    whole = training_bytes(config, TRAINING)
    assert training_bytes(config, TRAINING, cp=4) < 0.5 * whole
    # Four ranks with a row each, whether parts or ranks divide the batch.
    one_row = dataclasses.replace(TRAINING, batch_size=1, accumulation=1)
    alone = dataclasses.replace(TRAINING, accumulation=1)
    assert training_bytes(config, alone, dp=4) == training_bytes(config, one_row) < whole
    large = dataclasses.replace(config, d_model=512, dim_feedforward=2048, num_decoder_layers=8)
    few = dataclasses.replace(TRAINING, seq_len=16)
    assert training_bytes(large, few, cp=2, shards=8) < 0.5 * training_bytes(large, few)


def test_accumulation_and_bfloat16_take_less(config):
    whole = training_bytes(config, dataclasses.replace(TRAINING, accumulation=1))
    assert training_bytes(config, TRAINING) < whole
    assert training_bytes(config, dataclasses.replace(TRAINING, dtype="bfloat16")) < whole


def test_a_policy_makes_a_run_fit_that_would_not(config, monkeypatch):
    """Before anything is allocated, with the memory that there is."""
    config = dataclasses.replace(config, num_decoder_layers=8)
    device = torch.device("cpu")
    halve = dataclasses.replace(TRAINING, accumulation=1, on_out_of_memory="halve")
    recompute = dataclasses.replace(TRAINING, accumulation=1, on_out_of_memory="checkpoint")
    needed = training_bytes(config, dataclasses.replace(halve, accumulation=2))
    less = training_bytes(dataclasses.replace(config, activation_checkpointing=True), recompute)
    available = max(needed, less)
    monkeypatch.setattr("dilated_models.longnet.size.available_bytes", lambda device: available)
    assert [m.accumulation for m in fit_memory(config, halve, device)] == [2]
    (measure,) = fit_memory(config, recompute, device)
    assert measure.activation_checkpointing
    with pytest.raises(ValueError, match="training with batch_size 4"):
        fit_memory(config, dataclasses.replace(halve, on_out_of_memory="stop"), device)
    monkeypatch.setattr("dilated_models.longnet.size.available_bytes", lambda device: 1)
    with pytest.raises(ValueError, match="training with batch_size 4"):
        fit_memory(config, halve, device)
