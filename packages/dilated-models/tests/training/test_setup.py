"""From options to a checked run: short runs, memory, and the text of a resumed run."""

import dataclasses
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
