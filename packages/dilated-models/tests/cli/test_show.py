"""`dilated show`, in this process: what it draws and refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.cli.app import run
from dilated_models.longnet.saving import save_model, write_config

PATTERN = ["pattern", "--segment-lengths", "8,32", "--dilation-rates", "1,4"]


def show(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> Any:
    assert run(["show", *map(str, arguments)]) == code
    return capsys.readouterr()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    config = LongNetConfig(
        num_tokens=256,
        d_model=32,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=32,
        segment_lengths=(8, 32),
        dilation_rates=(1, 2),
    )
    write_config(folder, {"model": config.to_dict(), "tokenizer": "bytes"})
    save_model(folder, LongNetLM(config))
    return folder


@pytest.mark.parametrize("name", ["p.png", "p.html", "P.PNG"])
def test_a_pattern(tmp_path, capsys, name):
    out = tmp_path / name
    small = ["--heads", 2, "--seq-len", 40, "--no-causal", "--head-offsets", "blocked"]
    assert show(capsys, *PATTERN, *small, "--out", out).out == f"wrote {out}\n"
    content = out.read_bytes()
    assert content.startswith(b"\x89PNG" if name.lower().endswith("png") else b"<!DOCTYPE html>")
    if name == "p.html":
        assert b"40 positions, not causal" in content


@pytest.mark.parametrize("name", ["a.png", "a.html"])
def test_attention(tmp_path, capsys, checkpoint, name):
    out = tmp_path / name
    options = ["--checkpoint", checkpoint, "--rows", 3, "--layers", "1", "--out", out]
    show(capsys, "attention", *options, "--prompt", "def f(x):\n    return x")
    first = out.read_bytes()
    text = tmp_path / "prompt.txt"
    text.write_bytes(b"def f(x):\n    return \xff")
    show(capsys, "attention", *options, "--prompt-file", text)
    assert out.read_bytes() != first
    if name == "a.html":
        assert r'data-text="\xff"' in out.read_text("utf-8")
        assert '"layers":[1]' in out.read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PATTERN, "--out", "x.gif"], "--out is 'x.gif'; it must end with .png or .html."),
        ([*PATTERN, "--out", "none/x.png"], "there is no folder 'none'; make it first."),
        ([*PATTERN, "--seq-len", 3000], "is 3000; a picture shows at most 2,048"),
        ([*PATTERN, "--heads", 0], "heads is 0; it must be"),
        ([*PATTERN[:3], "--dilation-rates", "1,x"], "--dilation-rates is '1,x'; it must be"),
        ([*PATTERN, "--head-offsets", "odd"], "is 'odd'; it must be one of"),
        (
            ["attention", "--checkpoint", "RUN", "--prompt", "a", "--prompt-file", "b"],
            "are both given; give one of the two.",
        ),
        (["attention", "--checkpoint", "RUN"], "--prompt-file or a pipe.\n"),
        (["attention", "--checkpoint", "RUN", "--prompt", ""], "the prompt is empty; it must hold"),
        (["attention", "--checkpoint", "RUN", "--prompt-file", "no.txt"], "No such file"),
        (
            ["attention", "--checkpoint", "RUN", "--prompt", "a", "--rows", 0],
            "--rows is 0; it must be at least 1.",
        ),
        (
            ["attention", "--checkpoint", "RUN", "--prompt", "a", "--layers", "0,2"],
            "--layers holds 2; the model has the layers 0 to 1.",
        ),
        (["attention", "--checkpoint", "none", "--prompt", "a"], "'none' has no config.json"),
    ],
)
def test_user_errors_are_one_line_and_no_file(
    tmp_path, monkeypatch, capsys, checkpoint, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    arguments = [checkpoint if argument == "RUN" else argument for argument in arguments]
    printed = show(capsys, *arguments, code=2)
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not list(tmp_path.iterdir())
