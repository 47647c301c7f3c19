"""The memory of a run is estimated from below, and closely."""

import dataclasses

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.longnet.size import least_parameters, model_bytes
from dilated_models.training.config import TrainingConfig
from dilated_models.training.cost import fit_memory, training_bytes
from torch.nn.functional import cross_entropy

TRAINING = TrainingConfig(
    steps=10, batch_size=4, accumulation=2, seq_len=256, learning_rate=1e-3, warmup_steps=1,
    validate_every=1, checkpoint_every=1,
)  # fmt: skip


def kept_bytes(config: LongNetConfig) -> int:
    """Memory of all that autograd keeps for one part of a batch."""
    model = LongNetLM(config).train()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # alive, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    tokens = torch.randint(config.num_tokens, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(tokens.flatten(), cu_seqlens=torch.tensor([0, 100, 256, 300, 512]))
        cross_entropy(logits, tokens.flatten())
    return sum(sizes.values())


@pytest.mark.parametrize(
    "change",
    [
        *({}, {"activation": "gelu"}, {"dropout": 0.1}, {"activation_checkpointing": True}),
        *(
            {"key_conv": 4, "num_kv_heads": 1},
            {"key_conv": 16},
            {"num_encoder_layers": 3, "positions": "alibi"},
        ),
    ],
    ids=str,
)
def test_activations_are_estimated_within_a_fifth(config, change):
    config = dataclasses.replace(
        config, num_tokens=256, d_model=64, dim_feedforward=128, num_decoder_layers=4, **change
    )
    parameters = least_parameters(config)
    estimate = training_bytes(config, TRAINING) - model_bytes(config) - 8 * parameters
    assert estimate > 4 * parameters  # the activations, not the gradients
    logits = 2 * 256 * config.num_tokens * 4  # their gradient is not kept, but is in memory too
    inside = 0
    if change == {"activation_checkpointing": True}:  # one block is kept while it is differentiated
        inside = (9 * 64 + 2 * 128 + config.nhead) * 2 * 256 * 4
    assert estimate == pytest.approx(kept_bytes(config) + logits + inside, rel=0.2)


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
    with pytest.raises(ValueError, match="on_out_of_memory is 'halve' and there are 2 processes"):
        fit_memory(config, halve, device, num_processes=2)
