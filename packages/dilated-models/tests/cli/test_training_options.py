"""Options of `dilated train` for copies, growing windows and the convolution before attention."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from dilated_models import LongNetConfig
from dilated_models.cli.app import app
from dilated_models.cli.errors import option_of
from dilated_models.cli.options import MODEL_FIELDS, named_values
from dilated_models.longnet.saving import load_model
from dilated_models.training.config import PRESETS
from typer.main import get_command
from typer.testing import CliRunner

SMALL = [
    *("--steps", "1", "--seq-len", "32", "--batch-size", "2", "--d-model", "16", "--heads", "4"),
    *("--layers", "1", "--feed-forward", "16", "--segment-lengths", "8,32"),
    *("--dilation-rates", "1,2", "--validation-tokens", "64", "--final-validation-tokens", "64"),
]


def train(text: Path, out: Path, *options: object, code: int = 0) -> dict[str, Any]:
    """`config.json` of a run; or the error line of a refused one."""
    arguments = ["train", "--text", text, "--out", out, *SMALL, *options]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return json.loads((out / "config.json").read_text()) if code == 0 else {"error": result.stderr}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilated_models.training.samples._SAMPLE_TOKENS", 1)


def test_the_preset_and_its_options(text: Path, tmp_path: Path):
    preset = train(text, tmp_path / "preset")
    numbers, model = PRESETS["tiny"].training, PRESETS["tiny"].model
    assert preset["training"]["warmup_copies"] == numbers["warmup_copies"] > 0
    share = numbers["first_seq_len"] / numbers["seq_len"]
    assert preset["training"]["first_seq_len"] == share * 32  # --seq-len is 32
    assert preset["model"]["key_conv"] == model["key_conv"] > 0
    off = ["--warm-up-copies", 0, "--first-seq-len", 8, "--key-conv", 0, "--growth", 0.2]
    off += ["--local-window", 8]
    own = train(text, tmp_path / "own", *off)
    assert own["training"]["warmup_copies"] == own["model"]["key_conv"] == 0
    assert own["training"]["first_seq_len"] == 8
    assert own["training"]["growth"] == 0.2
    assert own["model"]["local_window"] == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--warm-up-copies", 2], "--warm-up-copies is 2.0; it must be at least 0 and at most 1."),
        (
            ["--first-seq-len", 64],
            "--first-seq-len is 64 and --seq-len 32; --first-seq-len must be",
        ),
        (["--preset", "small", "--growth", 0.5], "growth is 0.5 and --first-seq-len is not given"),
        (["--key-conv", -1], "--key-conv is -1; it must be at least 0."),
        (["--local-window", -1], "--local-window is -1; it must be at least 0."),
        (["--attention-kind", "moba"], "--segment-lengths is (8, 32); --attention-kind 'moba' has"),
        (["--attention-kind", "ring"], "--attention-kind is 'ring'; a run spreads the rows"),
        (["--attention-options", "topk"], "--attention-options is 'topk'; it must be names and"),
        (["--attention-options", "topk=2"], "--attention-options is {'topk': 2} and"),
        (["--kv-heads", 3], "--heads is 4 and --kv-heads 3; --kv-heads must divide --heads"),
        (["--model-options", "nhead=2"], "--model-options has the name 'nhead'; it must be one of"),
        (["--model-options", "padding=none"], "--model-options has padding=none; it must have a"),
        (["--model-options", "positions=sine"], "--model-options positions is 'sine'; it must be"),
        (["--model-options", "drop_path_rate=1"], "--model-options drop_path_rate is 1; it must"),
        (["--model-options", "tie_embeddings=1"], "--model-options tie_embeddings is 1; it must"),
    ],
)
def test_refusals(text: Path, tmp_path: Path, options: list[object], message: str):
    error = train(text, tmp_path / "run", *options, code=2)["error"]
    assert message in error
    assert error.startswith("dilated: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_all_that_a_model_can_be(text: Path, tmp_path: Path):
    """Every field of its config is an option, is saved, and holds after --resume."""
    fields = {
        "num_encoder_layers": 1,
        "drop_path_rate": 0.25,
        "activation": "gelu",
        "layer_norm_eps": 1e-4,
        "head_offsets": "blocked",
        "padding": "attended",
        "positions": "alibi",
        "xpos_scale_base": 256.0,
        "tie_embeddings": False,
        "scale_embedding": False,
        "final_layer_norm": False,
    }
    assert tuple(fields) == MODEL_FIELDS
    command = get_command(app).get_command(None, "train")
    options = {word for parameter in command.params for word in parameter.opts}
    own = {f.name for f in dataclasses.fields(LongNetConfig)} - {*fields, "num_tokens"}
    assert {option_of(name) for name in own} <= options
    out = tmp_path / "run"
    given = ",".join(f"{name}={value}" for name, value in fields.items())
    found = train(text, out, "--kv-heads", 2, "--model-options", given)["model"]
    assert fields.items() <= found.items()
    assert found["num_kv_heads"] == 2
    refused = CliRunner().invoke(
        app, ["train", "--resume", "--out", str(out), "--model-options", "padding=masked"]
    )
    assert "--resume continues a run with its own options; leave out --model-options." in (
        refused.stderr
    )
    again = CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--steps", "2"])
    assert again.exit_code == 0, again.output
    assert json.loads((out / "config.json").read_text())["model"] == found


def test_another_kind_of_attention(text: Path, tmp_path: Path):
    """Their options are those of the saved model, and the preset's branches are left out."""
    out = tmp_path / "blocks"
    small = [x for x in SMALL if x not in ("--segment-lengths", "8,32", "--dilation-rates", "1,2")]
    arguments = ["train", "--text", text, "--out", out, *small, "--attention-kind", "block_sparse"]
    options = "pattern_type=local_window,sparsity_ratio=0.5,block_size=8"
    result = CliRunner().invoke(app, [*map(str, arguments), "--attention-options", options])
    assert result.exit_code == 0, result.output
    assert "1 layers, block_sparse attention (block_size=8" in result.output
    model = load_model(out).config
    assert model.attention_kind == "block_sparse"
    assert dict(model.attention_options) == {
        "pattern_type": "local_window",
        "sparsity_ratio": 0.5,
        "block_size": 8,
    }


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("topk=2, mass=none", {"topk": 2, "mass": None}),
        ("x=1e-3,y=True,z=false,word=a-b", {"x": 1e-3, "y": True, "z": False, "word": "a-b"}),
    ],
)
def test_names_and_values(text: str, values: dict[str, Any]):
    assert named_values("--x", text) == values
    for wrong in ("", "a", "a=", "=1", "a=1,a=2"):
        with pytest.raises(ValueError, match=r"--x is .* each name once"):
            named_values("--x", wrong)


@pytest.mark.parametrize(("segments", "is_blind"), [("8,32", True), ("32,64", False)])
def test_queries_that_are_blind_behind_a_border_are_noted(text, tmp_path, segments, is_blind):
    arguments = ["train", "--text", text, "--out", tmp_path / "run", *SMALL]
    result = CliRunner().invoke(app, [*map(str, arguments), "--segment-lengths", segments])
    assert result.exit_code == 0, result.output
    assert ("note: behind each border of the segments of 8 tokens" in result.output) == is_blind


@pytest.mark.exhaustive
# torch.compile reads .grad of every tensor that it takes up.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler.")
def test_a_compiled_run_has_the_losses_of_one_that_is_not(text: Path, tmp_path: Path):
    losses: list[list[float]] = []
    for name, option in (("plain", []), ("compiled", ["--compile"])):
        train(text, tmp_path / name, "--steps", 3, "--dtype", "float32", *option)
        arguments = ["train", "--out", tmp_path / name, "--resume", "--steps", 5, *option]
        result = CliRunner().invoke(app, [str(a) for a in arguments])
        assert result.exit_code == 0, result.output
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses.append([x["loss"] for x in records if x["kind"] == "step"])
    assert len(losses[0]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
