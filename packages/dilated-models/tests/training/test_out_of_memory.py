"""The policies for a step that does not fit: what they change, record, and leave alone."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.text.files import text_files
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import ByteStream
from dilated_models.training.config import TrainingConfig
from dilated_models.training.loop import StepRecord, TrainingState
from dilated_models.training.out_of_memory import (
    MEASURE_FILE,
    is_out_of_memory,
    leave_measure,
    left_measure,
    take_measure,
)
from dilated_models.training.ranks import Ranks

TRAINING: dict[str, Any] = {
    "steps": 4,
    "batch_size": 4,
    "seq_len": 24,
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "validate_every": 100,
    "checkpoint_every": 100,
}
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 99 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def stream(text) -> ByteStream:
    return ByteStream(text_files([text])[0])


@pytest.fixture
def start(config: LongNetConfig):
    def fresh(**changes: Any) -> TrainingState:
        model = dataclasses.replace(config, num_tokens=256, dropout=changes.pop("dropout", 0.0))
        training = TrainingConfig(**TRAINING | changes)
        torch.manual_seed(0)
        return TrainingState(LongNetLM(model), training)

    return fresh


def run(state: TrainingState, stream: ByteStream, count: int | None = None) -> list[StepRecord]:
    order = RowOrder(num_tokens=len(stream), seq_len=24, seed=0)
    return list(itertools.islice(state.steps(stream, order), count))


def limit(monkeypatch: pytest.MonkeyPatch, error: BaseException, fits: Any) -> list[int]:
    """Raise the error in the forward pass of a part that does not fit; return what was tried."""
    tried: list[int] = []
    real = LongNetLM.hidden_states

    def hidden_states(self: LongNetLM, tokens: torch.Tensor, *rest: Any, **options: Any) -> Any:
        rows = tokens.shape[0] // 24
        tried.append(rows)
        hidden = real(self, tokens, *rest, **options)  # dropout has drawn its numbers
        if not fits(self, rows, len(tried)):
            raise error
        return hidden

    monkeypatch.setattr(LongNetLM, "hidden_states", hidden_states)
    return tried


@pytest.mark.parametrize("error", [CPU, GPU, MemoryError()])
def test_halving_keeps_the_batch_and_its_numbers(start, stream, monkeypatch, error):
    whole = run(start(), stream)
    state = start(on_out_of_memory="halve")
    # The second step does not fit: at first the whole batch, then a part of two rows.
    tried = limit(monkeypatch, error, lambda model, rows, n: n == 1 or rows == 1)
    records = run(state, stream)
    assert tried[:4] == [4, 4, 2, 1]
    assert set(tried[4:]) == {1}
    for a, b in zip(records, whole, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
        assert (a.step, a.num_tokens) == (b.step, b.num_tokens)
    assert [(m.step, m.policy, m.accumulation) for m in state.measures] == [
        (1, "halve", 2),
        (1, "halve", 4),
    ]
    assert state.config.accumulation == 4
    assert "after step 1 the run computes each batch in 4 parts" in str(state.measures[1])


def test_an_error_in_a_later_part_begins_the_step_anew(start, stream, monkeypatch):
    """The gradient of the parts that did fit must not count twice."""
    whole = run(start(accumulation=2), stream)
    state = start(accumulation=2, on_out_of_memory="halve")
    limit(monkeypatch, GPU, lambda model, rows, n: n != 4)  # the second part of the second step
    for a, b in zip(run(state, stream), whole, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
    assert len(state.measures) == 1


def test_checkpointing_changes_no_bit(start, stream, monkeypatch):
    whole = run(start(dropout=0.1), stream)
    state = start(dropout=0.1, on_out_of_memory="checkpoint")
    fits = lambda model, rows, n: model.config.activation_checkpointing or n == 1  # noqa: E731
    limit(monkeypatch, CPU, fits)
    records = run(state, stream)
    assert [(r.loss, r.gradient_norm) for r in records] == [
        (r.loss, r.gradient_norm) for r in whole
    ]
    (measure,) = state.measures
    assert (measure.step, measure.activation_checkpointing, measure.accumulation) == (1, True, 1)
    assert "recomputes each block in the backward pass" in str(measure)


def test_the_longest_windows_are_tried_with_measures_too(start, monkeypatch):
    state = start(on_out_of_memory="halve", first_seq_len=12)
    tried = limit(monkeypatch, GPU, lambda model, rows, n: rows == 1)
    state.try_longest_windows()
    assert tried == [4, 2, 1, 1]
    assert [(m.step, m.accumulation) for m in state.measures] == [(0, 2), (0, 4)]
    assert all(p.grad is None for p in state.model.parameters())


@pytest.mark.parametrize("policy", ["stop", "halve", "checkpoint"])
def test_without_a_measure_left_the_run_stops(start, stream, monkeypatch, policy):
    state = start(on_out_of_memory=policy)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    limit(monkeypatch, error, lambda model, rows, n: n == 1)
    before = run(state, stream, 1)
    weights = [p.detach().clone() for p in state.model.parameters()]
    with pytest.raises(torch.OutOfMemoryError):
        run(state, stream)
    notes = {
        "stop": [],
        "halve": ["a part has one row already; continue with --on-out-of-memory checkpoint"],
        "checkpoint": ["each block is recomputed already; continue with --on-out-of-memory halve"],
    }[policy]
    assert [note.partition(", or use more")[0] for note in getattr(error, "__notes__", [])] == notes
    assert state.step == before[0].step == 1
    assert all(torch.equal(a, b) for a, b in zip(weights, state.model.parameters(), strict=True))
    assert len(state.measures) == {"stop": 0, "halve": 2, "checkpoint": 1}[policy]


def test_another_error_is_raised(start, stream, monkeypatch):
    state = start(on_out_of_memory="halve")
    limit(monkeypatch, RuntimeError("shapes do not fit"), lambda model, rows, n: False)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(state, stream)
    assert not state.measures
    assert not is_out_of_memory(ValueError("can't allocate memory"))


@pytest.mark.parametrize(("dp", "expected"), [(1, [2, 4, 12]), (4, [6]), (12, [])])
def test_parts_divide_the_batch_and_become_smaller(config, dp, expected):
    """Of four ranks with three rows each, two parts of the batch would change nothing."""
    training = TrainingConfig(**TRAINING | {"batch_size": 12, "on_out_of_memory": "halve"})
    parts = []
    while measure := take_measure(config, training, step=0, error=MemoryError(), dp=dp):
        training = dataclasses.replace(training, accumulation=measure.accumulation)
        parts.append(measure.accumulation)
    assert parts == expected


def test_a_measure_is_left_where_the_next_start_finds_it(config, tmp_path):
    """In the folder of the run; at the launcher as long as there is none."""
    training = TrainingConfig(**TRAINING | {"on_out_of_memory": "checkpoint"})
    measure = take_measure(config, training, step=3, error=CPU)
    store, device = dist.HashStore(), torch.device("cpu")
    first, second = (Ranks(device, size=2, store=store, start=start) for start in (0, 1))
    assert left_measure(tmp_path, second) is None
    assert "--max-restarts), the run recomputes each block" in str(leave_measure(measure, first))
    assert left_measure(tmp_path, first) is None
    assert left_measure(tmp_path, second) == measure
    second.remember_run(tmp_path)
    assert left_measure(tmp_path, second) is None  # the run's config has it now
    assert "when all processes start again, the run" in str(leave_measure(measure, second))
    assert left_measure(tmp_path, Ranks(device)) == measure
    (tmp_path / MEASURE_FILE).write_text("{}")
    with pytest.raises(ValueError, match=r"out_of_memory.json' is damaged .* remove it"):
        left_measure(tmp_path, second)
