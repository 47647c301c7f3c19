"""The commands, in this process: what they write, say and refuse."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models.cli.app import app, run
from dilated_models.cli.progress import TrainingProgress
from dilated_models.longnet.saving import load_model
from dilated_models.training.metrics import read_metrics
from typer.testing import CliRunner

SMALL = [
    *("--seq-len", "32", "--batch-size", "2", "--d-model", "32", "--heads", "4"),
    *("--layers", "1", "--feed-forward", "32", "--segment-lengths", "8,32"),
    *("--dilation-rates", "1,2", "--validation-tokens", "64", "--final-validation-tokens", "300"),
]


def call(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    if result.exit_code != code:
        raise AssertionError(result.output) from result.exception
    return result


def losses(folder: Path) -> dict[tuple[str, int], float]:
    return {
        (r["kind"], r["step"]): r["loss"] if r["kind"] == "step" else r["bits_per_byte"]
        for r in read_metrics(folder)
        if r["kind"] != "final"
    }


@pytest.fixture(scope="module", autouse=True)
def short_samples() -> Iterator[None]:
    """A sample costs a forward for each token, so 5 tokens stand for 200."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dilated_models.training.samples._SAMPLE_TOKENS", 5)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_text: Any) -> Path:
    """A run of three steps, which tests read and leave as it is."""
    folder = tmp_path_factory.mktemp("trained")
    call(
        "train",
        "--text",
        write_text(folder / "text"),
        "--out",
        folder / "run",
        "--steps",
        3,
        *SMALL,
    )
    return folder / "run"


@pytest.fixture
def own_run(text: Path, tmp_path: Path) -> Path:
    call("train", "--text", text, "--out", tmp_path / "run", "--steps", 3, *SMALL)
    return tmp_path / "run"


def test_train_writes_and_reports(text, tmp_path):
    out = tmp_path / "deep" / "run"
    result = call(
        "train", "--text", text, "--out", out, "--steps", 12, "--validate-every", 4, *SMALL
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.pt",
        "config.json",
        "loss.png",
        "metrics.jsonl",
        "model.safetensors",
    ]
    records = read_metrics(out)
    kinds = [(r["kind"], r["step"]) for r in records if r["kind"] != "step"]
    assert kinds == [
        ("validation", 0),
        ("validation", 4),
        ("validation", 8),
        ("validation", 12),
        ("final", 12),
    ]
    assert [r["step"] for r in records if r["kind"] == "step"] == list(range(1, 13))
    assert {"loss", "bits_per_byte", "learning_rate", "peak_memory_bytes"} <= set(records[1])
    assert records[1]["peak_memory_bytes"] > 10e6
    final = records[-1]
    assert final["xz_bytes"] == 288  # 9 windows of 32
    assert final["evaluation"]["num_bytes"] == 286  # less the first byte of each of two files
    for expected in (
        "1 binary files skipped",
        "step 12/12",
        "tokens/s",
        "MiB",
        f"validation: {final['evaluation']['bits_per_byte']:.3f} bits per byte over 286 bytes",
        f"xz -9 on the same text, 288 bytes: {final['xz_bits_per_byte']:.3f}",
        "tokens of context",
        "counting predictor",
        "tokens from border",
    ):
        assert expected in result.output
    content = json.loads((out / "config.json").read_text())
    assert content["model"]["segment_lengths"] == [8, 32]
    assert content["training"]["steps"] == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_equals_uninterrupted(text, tmp_path, monkeypatch, number):
    options = ["--text", text, "--steps", 6, "--validate-every", 2, "--dropout", 0.1, *SMALL]
    call("train", "--out", tmp_path / "whole", *options)
    real, before = TrainingProgress.stepped, signal.getsignal(number)

    def stepped(self: TrainingProgress, record: Any) -> None:
        real(self, record)
        if record.step == 3:
            signal.raise_signal(number)

    monkeypatch.setattr(TrainingProgress, "stepped", stepped)
    out = tmp_path / "parts"
    result = call("train", "--out", out, *options, code=128 + number)
    assert f"stopped by {number.name} after step 3; everything is saved" in result.output
    assert signal.getsignal(number) is before
    assert (out / "loss.png").exists()
    assert load_model(out).config.d_model == 32
    resumed = call("train", "--resume", "--out", out)
    assert "continuing after step 3" in resumed.output
    assert losses(out) == losses(tmp_path / "whole")
    assert len(losses(out)) == 6 + 4
    ours, theirs = (load_model(folder).state_dict() for folder in (out, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_run_reports_again(own_run):
    before = losses(own_run)
    result = call("train", "--resume", "--out", own_run)
    assert "xz -9" in result.output
    assert losses(own_run) == before
    assert [r["kind"] for r in read_metrics(own_run)].count("final") == 1


def test_the_seed_decides(text, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        call(
            "train", "--text", text, "--out", tmp_path / name, "--steps", 2, "--seed", seed, *SMALL
        )
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert set(losses(tmp_path / "a").values()).isdisjoint(losses(tmp_path / "c").values())


def test_without_out_runs_go_under_runs_and_resume_finds_the_newest(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call("train", "--text", text, "--steps", 2, *SMALL)
    (folder,) = (tmp_path / "runs").iterdir()
    result = call("train", "--resume", "--steps", 3)
    assert f"writing to {folder.relative_to(tmp_path)}" in result.output
    assert read_metrics(folder)[-1]["step"] == 3


def test_the_pattern_scales_with_the_window(text, tmp_path):
    call(
        "train", "--text", text, "--out", tmp_path / "run", "--steps", 1, "--seq-len", 64,
        "--d-model", 24, "--feed-forward", 32, "--batch-size", 1, "--layers", 1,
        "--final-validation-tokens", 64, "--validation-tokens", 64,
    )  # fmt: skip
    content = json.loads((tmp_path / "run" / "config.json").read_text())
    assert content["model"]["segment_lengths"][-1] == 64


def test_a_tokenizer_all_the_way(text, tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train([str(p) for p in sorted(text.glob("*.py"))], trainer)
    tokenizer.save(str(tmp_path / "bpe.json"))
    out = tmp_path / "run"
    call(
        "train", "--text", text, "--out", out, "--steps", 2, "--tokenizer", tmp_path / "bpe.json",
        *SMALL,
    )  # fmt: skip
    (tmp_path / "bpe.json").unlink()  # the run keeps its own copy
    call("train", "--resume", "--out", out)
    final = read_metrics(out)[-1]["evaluation"]
    assert final["num_bytes"] > 1.2 * final["num_tokens"]
    assert final["bits_per_byte"] < final["bits_per_token"]
    step = read_metrics(out)[1]
    assert step["bits_per_byte"] < step["loss"] / 0.6931 * 0.9
    evaluated = call("evaluate", "--checkpoint", out, "--text", text / "file1.py")
    size = (text / "file1.py").stat().st_size
    assert f"bits per byte over {size - 3} bytes" in evaluated.output  # "def" is its first token
    generated = call("generate", "--checkpoint", out, "--prompt", "def f", "--max-new-tokens", 3)
    assert generated.output.startswith("def f")


def test_a_text_too_short_once_tokenised_leaves_no_folder(text, tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "one.json"))  # a whole file is one unknown token
    out = tmp_path / "run"
    result = call(
        "train", "--text", text, "--out", out, "--tokenizer", tmp_path / "one.json", *SMALL, code=2
    )
    assert "tokens; it must have at least --seq-len + 1 = 33" in result.stderr
    assert not out.exists()


def test_evaluate(trained, text):
    files = [text / "file1.py", text / "file2.py"]
    whole = call("evaluate", "--checkpoint", trained, "--text", *files)
    sizes = [file.stat().st_size for file in files]
    assert f"bits per byte over {sum(sizes) - 2} bytes" in whole.output
    targets = sum(16 * ((size - 33) // 16 + 1) for size in sizes)
    assert f"same {targets} targets with growing context" in whole.output
    bounded = call(
        "evaluate", "--checkpoint", trained, "--text", text, "--max-tokens", 64, "--seq-len", 16
    )
    assert "over 64 bytes" in bounded.output
    assert "same 16 targets with growing context" in bounded.output


def test_generate(trained):
    arguments = ["generate", "--checkpoint", trained, "--prompt", "def ", "--max-new-tokens", 12]
    first = call(*arguments).output
    assert first.startswith("def ")
    assert call(*arguments).output == first
    assert call(*arguments, "--seed", 1).output != first
    greedy = call(*arguments, "--temperature", 0).output
    assert call(*arguments, "--top-k", 1).output == greedy


TRAIN_ERRORS = [
    (["--text", "{dir}/nowhere"], "there is no file or folder '{dir}/nowhere'; correct the path"),
    (["--text", "{dir}/empty.txt"], "there is no text in '{dir}/empty.txt'"),
    (["--text", "{dir}/short.txt"], "it must have enough to hold out 0.05 of them"),
    (
        ["--text", "{dir}/few.txt"],
        "the training text has 95 tokens; it must have at least --seq-len",
    ),
    (["stray"], "'stray' belongs to no option; a text must be named with --text"),
    (["--preset", "huge"], "--preset is 'huge'; it must be one of 'tiny', 'small', 'base'"),
    (["--segment-lengths", "8,x"], "--segment-lengths is '8,x'; it must be integers with commas"),
    (["--segment-lengths", "8,0"], "--segment-lengths"),
    (["--segment-lengths", "8"], "--segment-lengths has 1 entries and --dilation-rates 2"),
    (["--dilation-rates", "1,-1"], "--dilation-rates"),
    (["--heads", "5"], "--heads is 5 and --d-model 32; --heads must divide --d-model"),
    (["--dropout", "1.5"], "--dropout is 1.5; it must be at least 0 and below 1."),
    (["--steps", "0"], "--steps is 0; it must be at least 1."),
    (["--lr", "-1"], "--lr is -1.0; it must be above 0"),
    (
        ["--accumulation", "3"],
        "--accumulation is 3 and --batch-size 2; --accumulation must divide --batch-size",
    ),
    (
        ["--device", "cuda:7"],
        "--device is 'cuda:7', which this machine does not have; use auto or cpu",
    ),
    (["--device", "toaster"], "--device is 'toaster'; it must be auto, cpu, cuda, cuda:0"),
    (
        ["--dtype", "float16"],
        "--dtype is 'float16'; it must be one of 'auto', 'float32', 'bfloat16'",
    ),
    (["--backend", "abacus"], "abacus"),
    (["--tokenizer", "{dir}/none.json"], "there is no tokenizer file '{dir}/none.json'; correct"),
    (["--tokenizer", "{dir}/few.txt"], "few.txt' is not a tokenizer file"),
    (["--out", "{dir}/few.txt"], "few.txt' is a file; --out must be a folder, so choose"),
    (["--out", "{dir}/few.txt/run"], "few.txt' is a file; --out must be a folder, so choose"),
    (["--resume", "--out", "{dir}/nowhere"], "has no config.json; it must be the --out folder of"),
]


@pytest.mark.parametrize(("arguments", "message"), TRAIN_ERRORS, ids=lambda x: str(x)[:40])
def test_train_refuses_in_one_line_and_writes_nothing(text, tmp_path, arguments, message):
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("short")
    (folder / "few.txt").write_text("0123456789" * 10)
    arguments = [a.replace("{dir}", str(folder)) for a in arguments]
    base = [] if "--resume" in arguments else list(SMALL)
    if "--text" not in arguments and "--resume" not in arguments and "stray" not in arguments:
        base += ["--text", str(text)]
    if "--text" in arguments and "few" in arguments[1]:
        base += ["--seq-len", "96"]
    if "--out" not in arguments:
        base += ["--out", str(tmp_path / "run")]
    before = sorted(tmp_path.rglob("*"))
    result = call("train", *base, *arguments, code=2)
    assert message.replace("{dir}", str(folder)) in result.stderr
    assert result.stderr.startswith("dilated: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_train_does_not_touch_a_folder_that_holds_a_run(own_run, text):
    before = {path: path.read_bytes() for path in own_run.iterdir()}
    result = call("train", "--text", text, "--out", own_run, *SMALL, code=2)
    assert "already holds a run; --out must be a new folder" in result.stderr
    result = call("train", "--resume", "--out", own_run, "--lr", 1, "--heads", 2, code=2)
    assert "with its own options; leave out --lr, --heads" in result.stderr
    (text / "file1.py").write_text("other")
    result = call("train", "--resume", "--out", own_run, code=2)
    assert "the text has changed since" in result.stderr
    assert {path: path.read_bytes() for path in own_run.iterdir()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", "--checkpoint", "{run}", "--prompt", ""],
            "prompt is empty; it must hold at least one token",
        ),
        (
            ["generate", "--checkpoint", "{run}", "--prompt", "a", "--top-k", "0"],
            "--top-k is 0; it must be",
        ),
        (
            ["generate", "--checkpoint", "{run}/x", "--prompt", "a"],
            "has no config.json; it must be",
        ),
        (
            ["generate", "--checkpoint", "{run}", "--prompt", "a", "--device", "x"],
            "--device is 'x'; it must",
        ),
        (
            ["evaluate", "--checkpoint", "{run}"],
            "there is no text; it must be named, so add --text",
        ),
        (["evaluate", "--checkpoint", "{run}", "--text", "{run}/x"], "there is no file or folder"),
        (
            ["evaluate", "--checkpoint", "{run}", "--text", "{run}", "--seq-len", "0"],
            "--seq-len is 0; it must be at least 1",
        ),
        (
            ["evaluate", "--checkpoint", "{run}", "--text", "{run}", "--dtype", "x"],
            "--dtype is 'x'",
        ),
    ],
)
def test_generate_and_evaluate_refuse_in_one_line(trained, arguments, message):
    result = call(*(a.replace("{run}", str(trained)) for a in arguments), code=2)
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_model_without_a_training_run_is_evaluated_at_a_given_length(trained, text, tmp_path):
    content = json.loads((trained / "config.json").read_text())
    del content["training"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    arguments = ["evaluate", "--checkpoint", tmp_path, "--text", text / "file1.py"]
    result = call(*arguments, code=2)
    assert "was not trained by dilated train; the length of windows must be given" in result.stderr
    assert "bits per byte over" in call(*arguments, "--seq-len", 16).output


def test_damaged_weights_are_one_line(own_run):
    (own_run / "model.safetensors").write_bytes(b"damaged")
    result = call("generate", "--checkpoint", own_run, "--prompt", "a", code=2)
    assert "does not hold this model's weights" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--no-such-option"], "--no-such-option"),
        (["train", "--steps", "many"], "'--steps'"),
        (["fly"], "No such command 'fly'"),
        (["generate", "--prompt", "x"], "Missing option '--checkpoint'"),
    ],
)
def test_usage_errors_are_one_line(capsys, arguments, message):
    assert run(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("dilated: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
