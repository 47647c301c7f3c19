"""TrainingConfig: the learning rate of each step, the presets, every refusal by its text."""

import itertools
from typing import Any

import pytest
from dilated_models import LongNetConfig
from dilated_models.training.config import PRESETS, TrainingConfig

TRAINING: dict[str, Any] = {
    "steps": 6,
    "batch_size": 4,
    "seq_len": 24,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "validate_every": 100,
    "checkpoint_every": 100,
}


def test_the_schedule():
    config = TrainingConfig(**TRAINING | {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0})
    rates = [config.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert config.learning_rate_at(1000) == pytest.approx(0.1)


@pytest.mark.parametrize("power", [0.5, 1, 3])
def test_the_polynomial_schedule(power):
    numbers = {"steps": 100, "warmup_steps": 10, "learning_rate": 2.0, "final_share": 0.2}
    shape = {"schedule": "polynomial", "schedule_power": power}
    config = TrainingConfig(**TRAINING | numbers | shape)
    rates = [config.learning_rate_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * i for i in range(1, 11)])
    for step in range(10, 101):
        left = 1 - (step - 10) / 90
        assert rates[step] == pytest.approx(0.4 + 1.6 * left**power)
    assert config.learning_rate_at(1000) == pytest.approx(0.4)


def test_windows_double_until_the_given_share_of_the_steps():
    numbers = {"steps": 100, "seq_len": 1024, "first_seq_len": 128, "growth": 0.6}
    config = TrainingConfig(**TRAINING | numbers)
    lengths = [config.window_at(step) for step in range(100)]
    assert lengths == [128] * 20 + [256] * 20 + [512] * 20 + [1024] * 40
    uneven = TrainingConfig(**TRAINING | numbers | {"first_seq_len": 300})
    assert sorted({uneven.window_at(step) for step in range(100)}) == [300, 600, 1024]
    assert TrainingConfig(**TRAINING | {"first_seq_len": 24}).window_at(0) == 24
    assert TrainingConfig(**TRAINING).window_at(0) == 24


def test_the_share_of_copies():
    for share, steps in ((0.0, 0), (0.3, 30), (1.0, 100)):
        config = TrainingConfig(**TRAINING | {"steps": 100, "warmup_copies": share})
        assert config.copied_steps == steps
    assert TrainingConfig(**TRAINING).copied_steps == 0
    assert PRESETS["tiny"].training["warmup_copies"] == 0.2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_together(name):
    preset = PRESETS[name]
    model = LongNetConfig.from_dict(preset.model | {"num_tokens": 256})
    training = TrainingConfig.from_dict(preset.training)
    assert max(model.segment_lengths) <= training.seq_len
    assert min(model.dilation_rates) == 1
    assert TrainingConfig.from_dict(training.to_dict()) == training


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0; it must be at least 1"),
        ({"steps": 1.5}, TypeError, r"steps is 1\.5; it must be an integer"),
        ({"seq_len": True}, TypeError, "seq_len is True; it must be an integer"),
        ({"learning_rate": 0.0}, ValueError, r"learning_rate is 0\.0; it must be above 0"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate is inf; it must be finite"),
        ({"weight_decay": -1.0}, ValueError, r"weight_decay is -1\.0; it must be at least 0"),
        ({"seed": -1}, ValueError, "seed is -1; it must be at least 0"),
        ({"seed": 2**64}, ValueError, f"seed is {2**64}; it must be at most {2**64 - 1}"),
        ({"beta2": 1.0}, ValueError, r"beta2 is 1\.0; it must be at least 0 and below 1"),
        (
            {"final_share": 2.0},
            ValueError,
            r"final_share is 2\.0; it must be at least 0 and at mos",
        ),
        (
            {"validation_share": 1},
            ValueError,
            "validation_share is 1; it must be above 0 and below",
        ),
        ({"accumulation": 3}, ValueError, "accumulation is 3 and batch_size 4; accumulation must"),
        ({"dtype": "float16"}, ValueError, "dtype is 'float16'; it must be one of 'float32', 'bfl"),
        (
            {"warmup_copies": 1.1},
            ValueError,
            r"warmup_copies is 1\.1; it must be at least 0 and at",
        ),
        ({"growth": 0.0}, ValueError, r"growth is 0\.0; it must be above 0 and at most 1"),
        ({"first_seq_len": 25}, ValueError, "first_seq_len is 25 and seq_len 24; first_seq_len mu"),
        ({"first_seq_len": 0}, ValueError, "first_seq_len is 0; it must be at least 1"),
        ({"first_seq_len": 2.5}, TypeError, r"first_seq_len is 2\.5; it must be an integer"),
        (
            {"schedule": "linear"},
            ValueError,
            "schedule is 'linear'; it must be one of 'cosine'",
        ),
        ({"schedule_power": 2.0}, ValueError, 'schedule_power is 2 and schedule "cosine", which'),
        ({"gradient_clip": -1}, ValueError, "gradient_clip is -1; it must be at least 0"),
        ({"on_out_of_memory": "wait"}, ValueError, "on_out_of_memory is 'wait'; it must be one of"),
        ({"tensorboard": 1}, TypeError, "tensorboard is 1; it must be True or False"),
        ({"epochs": 3}, TypeError, "TrainingConfig has no argument 'epochs'; its arguments are"),
        ({"dtype": 16}, ValueError, "dtype is 16; it must be one of 'float32', 'bfloat16'"),
    ],
)
def test_refusals(change, error, message):
    with pytest.raises(error, match=message):
        TrainingConfig.from_dict(TRAINING | change)
