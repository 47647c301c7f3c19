"""Options of `dilated train` for a lack of memory, samples, schedules and TensorBoard."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models import LongNetLM
from dilated_models.cli.app import app
from dilated_models.training.metrics import read_metrics
from dilated_models.training.tensorboard import TENSORBOARD_FOLDER, TensorBoard
from typer.testing import CliRunner

SMALL = [
    *("--seq-len", "32", "--batch-size", "4", "--d-model", "16", "--heads", "4"),
    *("--layers", "1", "--feed-forward", "16", "--segment-lengths", "8,32"),
    *("--dilation-rates", "1,2", "--validation-tokens", "64", "--final-validation-tokens", "64"),
    *("--warm-up-copies", "0", "--first-seq-len", "32"),
]


def train(*options: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", *map(str, options)])
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilated_models.training.samples._SAMPLE_TOKENS", 2)


def without_room(monkeypatch: pytest.MonkeyPatch, *, most_rows: int) -> None:
    """In training, a part of more rows does not fit."""
    real = LongNetLM.hidden_states

    def hidden_states(self: LongNetLM, tokens: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if self.training and torch.is_grad_enabled() and len(tokens) > 32 * most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(self, tokens, *rest, **options)

    monkeypatch.setattr(LongNetLM, "hidden_states", hidden_states)


def test_a_lack_of_memory_is_answered_recorded_and_remembered(text, tmp_path, monkeypatch):
    out, whole = tmp_path / "run", tmp_path / "whole"
    shape = ("--text", text, *SMALL, "--steps", 3, "--checkpoint-every", 1)
    train(*shape, "--out", whole)
    without_room(monkeypatch, most_rows=1)
    stopped = train(*shape, "--out", tmp_path / "stopped", code=2)
    assert "out of memory: CUDA out of memory" in stopped.stderr
    assert "--on-out-of-memory" in stopped.stderr
    result = train(*shape, "--out", out, "--on-out-of-memory", "halve")
    assert result.output.count("out of memory (CUDA out of memory.") == 2
    assert "); after step 0 the run computes each batch in 4 parts" in result.output
    assert json.loads((out / "config.json").read_text())["training"]["accumulation"] == 4
    found = [r for r in read_metrics(out) if r["kind"] == "out_of_memory"]
    assert [(r["step"], r["policy"], r["accumulation"]) for r in found] == [
        (0, "halve", 2),
        (0, "halve", 4),
    ]
    for a, b in zip(losses(out), losses(whole), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    # The resumed run begins with the parts that fit, and keeps the record.
    again = train("--resume", "--out", out, "--steps", 4)
    assert "out of memory" not in again.output
    assert [r for r in read_metrics(out) if r["kind"] == "out_of_memory"] == found
    # A run that was stopped takes the policy when it is resumed.
    train("--resume", "--out", tmp_path / "stopped", "--on-out-of-memory", "halve")
    assert losses(tmp_path / "stopped") == losses(out)[:3]


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder) if r["kind"] == "step"]


def test_samples_change_nothing_else(text, tmp_path):
    """Nor do schedules and clipping get lost on their way to the run."""
    shape = ("--text", text, *SMALL, "--steps", 4, "--dropout", 0.1, "--gradient-clip", 0)
    shape += ("--schedule", "polynomial", "--schedule-power", 2)
    train(*shape, "--out", tmp_path / "plain")
    result = train(*shape, "--out", tmp_path / "run", "--sample-every", 2)
    samples = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "sample"]
    assert [r["step"] for r in samples] == [0, 2, 4]
    assert all(len(r["sample"]) for r in samples)
    assert [x["context"] for x in samples[1]["by_context"]] == [16, 32]
    assert "step 2: bits per byte after so many tokens of context: 16: " in result.output
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    assert len(set(losses(tmp_path / "run"))) == 4
    numbers = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert (numbers["schedule"], numbers["schedule_power"]) == ("polynomial", 2)
    assert numbers["gradient_clip"] == 0


def test_without_tensorboard_nothing_is_begun(text, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    shape = ("--text", text, *SMALL, "--steps", 1, "--out", tmp_path / "run")
    result = train(*shape, "--tensorboard", code=2)
    assert (
        "tensorboard is not installed; --tensorboard needs the extra tensorboard" in result.stderr
    )
    assert not (tmp_path / "run").exists()


def test_tensorboard_has_the_metrics(text, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    shape = ("--text", text, *SMALL, "--steps", 3, "--sample-every", 2, "--checkpoint-every", 1)
    train(*shape, "--out", out, "--tensorboard")
    train("--resume", "--out", out, "--steps", 4)
    events = EventAccumulator(str(out / TENSORBOARD_FOLDER))
    events.Reload()
    records = read_metrics(out)
    for name in ("loss", "learning_rate", "gradient_norm"):
        wanted = {r["step"]: r[name] for r in records if r["kind"] == "step"}
        found = {e.step: e.value for e in events.Scalars(f"step/{name}")}
        assert found == pytest.approx(wanted, rel=1e-6)
    assert {e.step for e in events.Scalars("sample/bits_per_byte_after_16")} == {0, 2, 4}
    assert "sample/sample/text_summary" in events.Tags()["tensors"]


def test_numbers_that_are_not_finite_are_left_out(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path, after_step=0)
    board.write("step", 1, {"loss": float("nan"), "rows": [1], "gain": None})
    board.close()
