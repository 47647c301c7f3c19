"""From options to a checked run: short runs, memory, and the text of a resumed run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dilated_models.longnet.saving import write_config
from dilated_models.training.config import PRESETS
from dilated_models.training.run import Run, build
from dilated_models.training.setup import new_run, resumed_run

CPU = torch.device("cpu")
MODEL: dict[str, Any] = {"d_model": 16, "nhead": 2, "num_decoder_layers": 1, "dim_feedforward": 16}


def made(folder: Path, text: Path, **training: Any) -> Run:
    return new_run(
        folder=folder, preset="tiny", text=[text], tokenizer="bytes", device=CPU, model=MODEL,
        training=training,
    )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_validation_takes_at_most_half_as_long_as_training(tmp_path, text, steps):
    config = made(tmp_path / "run", text, steps=steps, seq_len=64).training
    during = config.validation_tokens * (-(-steps // config.validate_every))
    forwards = (during + config.final_validation_tokens) / 3  # in training steps' tokens
    first = (config.validation_tokens + 64) / 3  # before the first step, and of a whole window
    assert forwards <= 0.5 * steps * config.batch_size * config.seq_len + first


def test_long_runs_and_given_numbers_stay(tmp_path, text):
    config = made(tmp_path / "run", text).training
    assert config.validate_every == PRESETS["tiny"].training["validate_every"]
    given = {"validate_every": 1, "validation_tokens": 4096, "final_validation_tokens": 8192}
    config = made(tmp_path / "run", text, steps=2, **given).training
    assert {name: getattr(config, name) for name in given} == given


@pytest.mark.parametrize(
    ("model", "training"),
    [({}, {"seq_len": 10**11}), ({"num_decoder_layers": 10**7}, {}), ({"d_model": 10**8}, {})],
    ids=str,
)
def test_what_cannot_fit_is_refused_before_it_is_allocated(tmp_path, text, model, training):
    run = made(tmp_path / "run", text)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **model),
        training=dataclasses.replace(run.training, **training),
    )
    with pytest.raises(ValueError, match=r"layers needs about [\d,.]+ GiB of memory and cpu has"):
        build(run)


def test_a_resumed_run_is_the_same_run_on_the_same_text(tmp_path, text):
    run = made(tmp_path / "run", text)
    run.folder.mkdir()
    write_config(run.folder, run.to_config())
    resumed = resumed_run(run.folder, device=CPU, training={"steps": 9})
    assert (resumed.run_id, resumed.fingerprint) == (run.run_id, run.fingerprint)
    assert made(tmp_path / "other", text).run_id != run.run_id
    content = (text / "file1.py").read_bytes()
    (text / "file1.py").write_bytes(content.replace(b"return", b"yields"))  # of equal size
    with pytest.raises(ValueError, match="removed, renamed or edited"):
        resumed_run(run.folder, device=CPU, training={})
    (text / "file1.py").write_bytes(content)
    resumed_run(run.folder, device=CPU, training={})


def test_a_folder_of_text_is_no_folder_for_a_run(text):
    with pytest.raises(ValueError, match="is both --text and --out; the run would write its files"):
        made(text, text)
    made(text / "runs", text)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("text", {"paths": 5, "fingerprint": ""}, r"text\.paths is 5; it must be a list of paths"),
        ("text", {"paths": ["a", 5], "fingerprint": ""}, r"text\.paths is \['a', 5\]; it must be"),
        ("text", None, "'NoneType' object"),
        ("training", None, "'NoneType' object is not a mapping"),
    ],
)
def test_an_edited_config_is_named(tmp_path, text, part, value, message):
    run = made(tmp_path / "run", text)
    run.folder.mkdir()
    write_config(run.folder, run.to_config() | {part: value})
    with pytest.raises(ValueError, match=rf"config\.json' cannot be resumed from: .*{message}"):
        resumed_run(run.folder, device=CPU, training={})


def test_other_steps_change_no_window_and_no_row(tmp_path, text):
    """Only the curve of the learning rate follows the new number, however often it changes."""
    numbers = {"steps": 40, "seq_len": 64, "warmup_copies": 0.25, "growth": 0.5, "first_seq_len": 8}
    run = made(tmp_path / "run", text, **numbers)
    run.folder.mkdir()
    for steps in (40, 200, 12, 15):
        write_config(run.folder, run.to_config())
        run = resumed_run(run.folder, device=CPU, training={"steps": steps})
        assert run.training.steps == steps
        assert run.training.copied_steps == 10
        windows = [run.training.window_at(step) for step in range(24)]
        assert windows == [8] * 7 + [16] * 7 + [32] * 6 + [64] * 4
    with pytest.raises(ValueError, match="planned_steps is 0; it must be at least 1"):
        dataclasses.replace(run.training, planned_steps=0)


def test_an_edited_number_is_noticed(tmp_path, text):
    run = made(tmp_path / "run", text)
    run.folder.mkdir()
    write_config(run.folder, run.to_config())
    path, resumed = (
        run.folder / "config.json",
        lambda: resumed_run(run.folder, device=CPU, training={}),
    )
    whole = path.read_text("utf-8")
    path.write_text(json.dumps(json.loads(whole), sort_keys=True), "utf-8")
    assert not resumed().is_edited
    path.write_text(whole.replace('"seed": 0', '"seed": 1'), "utf-8")
    assert resumed().is_edited
    write_config(run.folder, resumed().to_config())
    assert not resumed().is_edited
