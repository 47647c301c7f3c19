"""What happens to a run when the world around it fails: one line, and a way to go on."""

import errno
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models.cli.app import app
from dilated_models.cli.progress import TrainingProgress
from dilated_models.longnet.saving import load_model
from dilated_models.training import run
from dilated_models.training.folder import hold
from dilated_models.training.metrics import read_metrics
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

SMALL = [
    *("--seq-len", "32", "--batch-size", "2", "--d-model", "16", "--heads", "2", "--layers", "1"),
    *("--feed-forward", "16", "--segment-lengths", "8,32", "--dilation-rates", "1,2"),
    *("--validation-tokens", "64", "--final-validation-tokens", "64", "--dropout", "0.1"),
    *("--steps", "4"),
]


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilated_models.training.samples._SAMPLE_TOKENS", 1)


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code != code:
        raise AssertionError(result.output) from result.exception
    return result


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Arranges that something happens once, after a step."""
    real = TrainingProgress.stepped

    def arrange(step: int, action: Callable[[], None]) -> None:
        def stepped(self: TrainingProgress, record: Any) -> None:
            real(self, record)
            if record.step == step:
                monkeypatch.setattr(TrainingProgress, "stepped", real)
                action()

        monkeypatch.setattr(TrainingProgress, "stepped", stepped)

    yield arrange
    monkeypatch.undo()


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder) if r["kind"] == "step"]


def ways_on(result: Any) -> list[str]:
    """The arguments of the command that the error line offers."""
    assert result.stderr.count("\n") == 1
    offered = shlex.split(result.stderr.partition("continue with: ")[2])
    assert offered[0] == "dilated"
    return offered[1:]


def tokenizer(folder: Path) -> Path:
    """A file of a tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    each_byte = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    each_byte.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    each_byte.save(str(folder / "bytes.json"))
    return folder / "bytes.json"


def test_text_that_vanishes_and_comes_back(text, tmp_path, at_step):
    out, away = tmp_path / "run", tmp_path / "away"
    call("train", "--text", text, "--out", tmp_path / "whole", *SMALL)
    at_step(2, lambda: text.rename(away))
    result = call("train", "--text", text, "--out", out, *SMALL, code=2)
    assert result.stderr.startswith("dilated: No such file or directory: '")
    assert "the last checkpoint is whole" in result.stderr
    again = call(*ways_on(result), code=2)
    assert f"there is no file or folder '{text}'" in again.stderr
    away.rename(text)
    call(*ways_on(result))
    assert losses(out) == losses(tmp_path / "whole")


def test_text_that_is_cut_short(text, tmp_path, at_step):
    (text / "large").mkdir()
    one = text / "large" / "one.txt"
    one.write_text("0123456789" * 10_000)
    at_step(1, lambda: os.truncate(one, 4096))
    result = call("train", "--text", one, "--out", tmp_path / "run", *SMALL, "--steps", 40, code=2)
    assert "one.txt' has become shorter since it was opened; put it back" in result.stderr
    assert ways_on(result)[-1] == str(tmp_path / "run")


def test_a_full_disk(text, tmp_path, at_step, monkeypatch):
    out = tmp_path / "run"
    real = os.fsync

    def fill() -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)

    at_step(3, fill)
    result = call("train", "--text", text, "--out", out, *SMALL, "--checkpoint-every", 3, code=2)
    assert result.stderr.startswith("dilated: No space left on device")
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    monkeypatch.setattr(os, "fsync", real)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == 0
    load_model(out)
    call(*ways_on(result))
    assert len(losses(out)) == 4


def test_a_disk_that_is_full_from_the_start(text, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = call("train", "--text", text, "--out", tmp_path / "deep" / "run", *SMALL, code=2)
    assert "No space left on device: '" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "deep").exists()


def test_a_folder_that_vanishes(text, tmp_path, at_step):
    out = tmp_path / "run"
    at_step(2, lambda: shutil.rmtree(out))
    result = call("train", "--text", text, "--out", out, *SMALL, code=2)
    assert result.stderr == (f"dilated: No such file or directory: '{out / 'model.safetensors'}'\n")
    assert not out.exists()


def test_a_second_process_in_the_same_folder(text, tmp_path):
    out = tmp_path / "run"
    call("train", "--text", text, "--out", out, *SMALL)
    before = (out / "metrics.jsonl").read_bytes()
    with hold(out, is_new=False):
        result = call("train", "--resume", "--out", out, code=2)
        assert f"another process ({os.getpid()}) writes to '{out}'" in result.stderr
        assert (out / "metrics.jsonl").read_bytes() == before
    with hold(tmp_path / "new", is_new=True):
        result = call("train", "--text", text, "--out", tmp_path / "new", *SMALL, code=2)
        assert "another process" in result.stderr


@pytest.mark.parametrize(
    "name", ["[red]run[bold] :smile: $x$$\\y", "two  words", os.fsdecode(b"r\xff")]
)
def test_the_hint_names_the_right_folder(text, tmp_path, at_step, name):
    try:
        text = text.rename(tmp_path / f"{name} text")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    out = tmp_path / name
    at_step(1, lambda: signal.raise_signal(signal.SIGINT))
    result = call("train", "--text", text, "--out", out, *SMALL, code=130)
    assert (out / "loss.png").exists()
    hint = result.stdout.partition("continue with: ")[2].strip()
    if name.isprintable():
        assert shlex.split(hint) == ["dilated", "train", "--resume", "--out", str(out)]
    else:
        assert hint == f"dilated train --resume --out $'{tmp_path}/r\\xff'"
    call("train", "--resume", "--out", out)
    assert len(losses(out)) == 4


def test_a_failure_before_the_first_checkpoint_is_no_dead_end(text, tmp_path):
    out = tmp_path / "run"
    options = ["--lr", "1e30", "--warmup-steps", 0, "--steps", 50, "--dropout", 0]
    result = call("train", "--text", text, "--out", out, *SMALL, *options, code=1)
    assert "is not finite in step" in result.stderr
    again = call(*ways_on(result), code=1)
    assert again.stderr == result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("reader", ["files.Split.fingerprint", "streams.ByteStream.text_of"])
def test_a_signal_while_the_text_is_read(text, tmp_path, monkeypatch, number, reader):
    """The second reader is that of the tokeniser."""
    out, before = tmp_path / "deep" / "run", signal.getsignal(number)
    options = ["--text", text, "--out", out, *SMALL, "--tokenizer", tokenizer(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(f"dilated_models.text.{reader}", lambda *_: signal.raise_signal(number))
        result = call("train", *options, code=128 + number)
        assert result.stderr == f"dilated: stopped at once by {number.name}\n"
        assert signal.getsignal(number) is before
        assert not (tmp_path / "deep").exists()
    call("train", *options)
    for part in (out / "tokens").iterdir():
        part.unlink()
    kept = {path: path.read_bytes() for path in out.rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(f"dilated_models.text.{reader}", lambda *_: signal.raise_signal(number))
        result = call("train", "--resume", "--out", out, code=128 + number)
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == kept
    if reader.endswith("text_of"):  # else the run was not opened yet
        assert "the last checkpoint is whole" in result.stderr
        call(*ways_on(result))


def test_two_signals_stop_at_once(text, tmp_path, at_step):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    at_step(2, twice)
    result = call("train", "--text", text, "--out", tmp_path / "run", *SMALL, code=130)
    assert result.stderr.startswith("dilated: stopped at once by SIGINT; the last checkpoint is")
    call(*ways_on(result))
    assert len(losses(tmp_path / "run")) == 4


def test_a_signal_that_ends_the_reader_of_the_output_too(text, tmp_path, monkeypatch):
    """As Ctrl-C for `dilated train | tee`, or SIGHUP with the terminal: the state is saved."""
    real = TrainingProgress.show

    def show(self: TrainingProgress, done: int, *numbers: Any, **more: Any) -> None:
        def broken(_: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        signal.raise_signal(signal.SIGINT)
        sys.stdout.write = broken
        real(self, done, *numbers, **more)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "show", show)
        call("train", "--text", text, "--out", tmp_path / "run", *SMALL, code=130)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1


def test_what_a_run_left_that_ended_in_its_beginning(text, tmp_path, monkeypatch):
    """It was killed before config.json: the next run must not keep its checkpoint of step 0."""
    out, found = tmp_path / "run", []
    (out / "checkpoint-000000000").mkdir(parents=True)
    (out / "checkpoint-000000000" / "manifest.json").write_text("{}")
    (out / "checkpoint.pt").touch()
    real = run.save_checkpoint

    def save(state: Any, folder: Path, **options: Any) -> None:
        found.append(list(folder.glob("checkpoint*")))
        real(state, folder, **options)

    monkeypatch.setattr(run, "save_checkpoint", save)
    call("train", "--text", text, "--out", out, *SMALL, "--steps", 1)
    assert found == [[], [out / "checkpoint.pt"]]


def test_what_a_resumed_run_refuses(text, tmp_path):
    out, other = tmp_path / "run", tmp_path / "other"
    for folder in (out, other):
        call("train", "--text", text, "--out", folder, *SMALL)
    checkpoint, metrics = out / "checkpoint.pt", out / "metrics.jsonl"

    def refused(*options: object) -> str:
        before = {path: path.read_bytes() for path in out.iterdir()}
        result = call("train", "--resume", "--out", out, *options, code=2)
        assert {path: path.read_bytes() for path in out.iterdir()} == before
        assert result.stderr.count("\n") == 1
        return result.stderr

    assert "--steps is 3 and the run has done 4; it must be at least that" in refused("--steps", 3)
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes((other / "checkpoint.pt").read_bytes())
    assert "checkpoint.pt' belongs to another run than its folder" in refused()
    assert "the last checkpoint is whole" not in refused()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    checkpoint.write_bytes(flipped)
    assert "checkpoint.pt' is damaged: its checksum is wrong" in refused()
    checkpoint.write_bytes(whole)
    lines = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join([*lines[:3], b"oops\n", *lines[3:]]))
    assert "line 4 of '" in (error := refused())
    assert "remove the line" in error
    metrics.write_bytes(b"".join(lines) + b'{"kind": "st')  # cut short by a crash: left out
    call("train", "--resume", "--out", out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "100000000000"], "--seq-len 100000000000 and 1 layers"),
        (["--seq-len", "1e11"], "Invalid value for '--seq-len': "),
        (["--steps", str(2**70)], f"--steps is {2**70}; it must be at most"),
        (["--timeout", "1e300"], "--timeout is 1e+300; it must be at least 1 and at most 10000000"),
        (["--seed", str(2**70)], f"--seed is {2**70}; it must be"),
        (["--layers", "100000000"], "and 100000000 layers needs about"),
        (["--out", "/proc/nowhere/run"], "No such file or directory: '/proc/nowhere"),
        (["--out", "/dev/null/run"], "'/dev/null' is a file; --out must be a folder"),
        (["--out", "/dev/full"], "'/dev/full' is a file; --out must be a folder"),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="names POSIX devices")
def test_numbers_and_folders_that_do_not_do(text, tmp_path, options, message):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", "--text", text, "--out", tmp_path / "run", *SMALL, *options]
    result = call(*arguments, code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
