"""The time of a run is estimated from the times of its short and long windows."""

import dataclasses

import pytest
import torch
from dilated_models import LongNetLM
from dilated_models.training.config import PRESETS, TrainingConfig
from dilated_models.training.duration import StepTimes
from dilated_models.training.loop import TrainingState

GROWING = TrainingConfig(
    steps=100, batch_size=2, seq_len=64, first_seq_len=16, growth=0.5, learning_rate=1e-3,
    warmup_steps=1, validate_every=40, checkpoint_every=50, validation_tokens=128,
    final_validation_tokens=256,
)  # fmt: skip


def all_steps(config: TrainingConfig, seconds: dict[int, float], step: int = 0) -> float:
    return sum(seconds[config.window_at(i)] for i in range(step, config.steps))


@pytest.mark.parametrize("step", [0, 3, 25, 26, 49, 50, 99, 100])
def test_each_length_has_its_own_time(step):
    times, seconds = StepTimes(GROWING), {16: 1.0, 32: 5.0, 64: 7.0}
    for window, each in seconds.items():
        times.add(window=window, seconds=each)
    assert times.left(step, scorable=0) == pytest.approx(all_steps(GROWING, seconds, step))
    assert times.longest == 7.0


def test_a_length_that_was_not_timed_lies_between_its_neighbours():
    times = StepTimes(GROWING)
    assert times.left(0, scorable=1000) == 0  # nothing is known yet
    times.add(window=64, seconds=4.0)
    times.add(window=16, seconds=1.0)
    between = all_steps(GROWING, {16: 1.0, 32: 2.0, 64: 4.0})
    assert times.left(0, scorable=0) == pytest.approx(between)


def test_the_first_step_which_is_slow_counts_for_nothing():
    times = StepTimes(GROWING)
    for seconds in (60.0, 2.0, 2.2, 1.9):
        times.add(window=64, seconds=seconds)
    assert times.longest == pytest.approx(2.0)


def test_validations_and_the_report_are_counted():
    """Forward passes take a third of a step: at 40, 80 and at the end, and contexts 16, 32, 64."""
    times = StepTimes(GROWING)
    times.add(window=64, seconds=3.0)
    scored = 2 * 128 + 256 + 3 * 2 * 64
    assert times.left(0, scorable=10**6) == pytest.approx(300 + scored / 128)
    assert times.left(40, scorable=10**6) == pytest.approx(180 + (scored - 128) / 128)
    assert times.left(100, scorable=10) == pytest.approx((10 + 3 * 2 * 10) / 128)
    sampled = StepTimes(dataclasses.replace(GROWING, sample_every=30))
    sampled.add(window=64, seconds=3.0)
    scored += 3 * (3 * 2 * 32)  # after 30, 60 and 90 steps, a quarter of 128 targets each
    assert sampled.left(0, scorable=10**6) == pytest.approx(300 + scored / 128)


def test_a_million_steps_are_not_walked_through():
    config = dataclasses.replace(GROWING, steps=10**15)
    times = StepTimes(config)
    times.add(window=64, seconds=1.0)
    assert times.left(0, scorable=0) == pytest.approx(1e15)


def test_the_longest_windows_are_timed_before_the_first_step(config):
    torch.manual_seed(0)
    config = dataclasses.replace(config, dropout=0.5, activation_checkpointing=True)
    state = TrainingState(LongNetLM(config), GROWING)
    weights = {name: x.clone() for name, x in state.model.state_dict().items()}
    numbers = torch.get_rng_state()
    state.try_longest_windows()
    assert state.times.longest > 0
    assert torch.equal(torch.get_rng_state(), numbers)
    for name, x in state.model.state_dict().items():
        assert torch.equal(x, weights[name])
    assert all(parameter.grad is None for parameter in state.model.parameters())
    assert (state.step, state.seconds) == (0, 0)


def test_windows_that_do_not_grow_are_timed_by_the_first_steps(config):
    state = TrainingState(LongNetLM(config), dataclasses.replace(GROWING, first_seq_len=None))
    state.try_longest_windows()
    assert state.times.longest == 0


def test_the_preset_tiny_is_not_estimated_from_short_windows():
    """It was: 3:17 where 4:12 came out, for windows of 128 tokens take less than those of 1,024."""
    training = TrainingConfig.from_dict(PRESETS["tiny"].training)
    times = StepTimes(training)
    times.add(window=128, seconds=0.078)
    times.add(window=1024, seconds=0.13)
    assert 225 < times.left(0, scorable=1_804_803) < 265
