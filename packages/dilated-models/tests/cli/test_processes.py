"""The installed command in processes of its own: signals, crashes, missing extras, imports."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dilated_models.cli.app import app
from dilated_models.cli.progress import TrainingProgress
from dilated_models.longnet.saving import load_model
from dilated_models.training.loop import StepRecord
from dilated_models.training.metrics import read_metrics
from typer.testing import CliRunner

ENDLESS = [
    *("--steps", "1000000", "--warmup-steps", "5", "--validate-every", "1000000"),
    *("--seq-len", "32", "--batch-size", "2", "--d-model", "32", "--heads", "4", "--layers", "1"),
    *("--feed-forward", "32", "--dropout", "0.1", "--segment-lengths", "8,32"),
    *("--dilation-rates", "1,2", "--validation-tokens", "64"),
]


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dilated_models", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def steps_of(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_metrics(folder) if r["kind"] == "step"}


def stop_after(process: subprocess.Popen[str], folder: Path, step: int, number: int) -> str:
    """Send a signal once the run has done `step` steps; return what it printed."""
    limit = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit:
        if (folder / "metrics.jsonl").exists() and step in steps_of(folder):
            process.send_signal(number)
            break
        time.sleep(0.02)
    out, err = process.communicate(timeout=120)
    assert err.strip() in ("", "dilated: stopping after this step; again to stop now")
    return out


def train_here(monkeypatch: pytest.MonkeyPatch, last: int, *arguments: object) -> None:
    """`dilated train` in this process, which asks itself to stop after step `last`."""
    real = TrainingProgress.stepped

    def stepped(self: TrainingProgress, record: StepRecord) -> None:
        real(self, record)
        if record.step == last:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "stepped", stepped)
        result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 143, result.output


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_signals_and_crashes_lose_nothing(text, tmp_path, monkeypatch):
    """A run stopped by SIGTERM, resumed, killed, and resumed, beside one that nothing disturbed."""
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    options = ["--text", text, "--checkpoint-every", 4, *ENDLESS]

    process = start("train", "--out", parts, *options)
    output = stop_after(process, parts, 5, signal.SIGTERM)
    assert process.returncode == 143
    assert "stopped by SIGTERM after step" in output
    after_first = max(steps_of(parts))
    assert torch.load(parts / "checkpoint.pt", weights_only=True)["step"] == after_first

    process = start("train", "--resume", "--out", parts)
    stop_after(process, parts, after_first + 9, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(parts / "checkpoint.pt", weights_only=True)["step"] > after_first
    load_model(parts)
    last = max(steps_of(parts)) + 5  # steps after the checkpoint are on record, and are redone

    train_here(monkeypatch, last, "--resume", "--out", parts)
    train_here(monkeypatch, last, "--out", whole, *options)
    assert steps_of(parts) == steps_of(whole)
    assert list(steps_of(parts)) == list(range(1, last + 1))


@pytest.mark.parametrize(("missing", "command"), [("typer", "info"), ("rich", "train")])
def test_without_the_extra_it_says_which_one(missing: str, command: str):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['dilated', {command!r}]\n"
        "from dilated_models.cli import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "is not installed" in result.stderr
    assert "pip install 'dilated-models[cli]'" in result.stderr
    assert result.stderr.count("\n") == 1


def test_help_is_quick_and_imports_have_no_effects():
    code = (
        "import sys, os; before = dict(os.environ)\n"
        "import dilated_models\n"
        "from dilated_models.cli.app import run\n"
        "assert [run([*c, '--help']) for c in ([], ['train'], ['generate'], ['info'])] == [0] * 4\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "from dilated_models import LongNetLM\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'typing_extensions_stub', 'tokenizers', 'matplotlib'} & set(sys.modules)\n"
        "assert dict(os.environ) == before\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert "--segment-lengths" in result.stdout
