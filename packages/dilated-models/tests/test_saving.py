"""Model files: whole or absent, exact, and strict when read."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.saving import (
    load_model,
    load_vocabulary,
    read_config,
    save_model,
    write_atomically,
    write_config,
)
from safetensors.torch import load_file, save_file


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path: Path, config: LongNetConfig) -> tuple[Path, LongNetLM]:
    config = dataclasses.replace(config, num_tokens=256, tie_embeddings=request.param)
    model = LongNetLM.from_config(config)
    write_config(tmp_path, {"model": config.to_dict(), "tokenizer": "bytes"})
    save_model(tmp_path, model)
    return tmp_path, model


def test_loads_what_was_saved(saved, tokens):
    folder, model = saved
    loaded = load_model(folder)
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    assert loaded.config == model.config
    names = set(load_file(folder / "model.safetensors"))
    assert ("output.weight" in names) is not model.config.tie_embeddings
    assert (loaded.output.weight is loaded.embedding.weight) is model.config.tie_embeddings


@pytest.mark.parametrize("fails_in", ["write", "os.fsync", "os.replace"])
def test_a_crash_leaves_the_old_file_whole(tmp_path, monkeypatch, fails_in):
    path = tmp_path / "file"
    path.write_text("old")

    def crash(*_: object) -> None:
        raise OSError("crash")

    def write(part: Path) -> None:
        part.write_text("half")
        if fails_in == "write":
            crash()
        part.write_text("new, whole")

    if fails_in != "write":
        monkeypatch.setattr(fails_in, crash)
    with pytest.raises(OSError, match="crash"):
        write_atomically(path, write)
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomically(path, lambda part: part.write_text("new, whole") and None)
    assert path.read_text() == "new, whole"


def test_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: order.append(n) or f(*a))
    write_atomically(tmp_path / "file", lambda part: part.write_text("x") and None)
    assert order == ["fsync", "replace", "fsync"]  # the last one for the folder


def test_missing_files(tmp_path, config):
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint folder: it has no config\.json"):
        load_model(tmp_path / "nowhere")
    write_config(tmp_path, {"model": config.to_dict(), "tokenizer": "bytes"})
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors yet"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content", ["not json", "[]", "{}", '{"format_version": 1, "model": 3, "tokenizer": "bytes"}']
)
def test_a_foreign_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match="was not written by dilated train"):
        read_config(tmp_path)


def test_another_format(saved):
    folder, _ = saved
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"format_version": 2}))
    with pytest.raises(ValueError, match=r"has format 2, but this version .* reads format 1"):
        load_model(folder)


def test_an_unknown_option(saved):
    folder, model = saved
    write_config(folder, {"model": model.config.to_dict() | {"moe": 1}, "tokenizer": "bytes"})
    with pytest.raises(ValueError, match="unknown configuration name 'moe'"):
        load_model(folder)


def test_damaged_or_foreign_weights(saved):
    folder, model = saved
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="does not hold this model's weights"):
        load_model(folder)
    state = {k: v for k, v in model.state_dict().items() if k != "output.weight"}
    del state["final_norm.weight"]
    save_file(state, path)
    with pytest.raises(ValueError, match=r"weights: .*final_norm\.weight"):
        load_model(folder)


def test_a_tokenizer_that_does_not_fit(tmp_path, config):
    write_config(tmp_path, {"model": config.to_dict(), "tokenizer": "bytes"})
    with pytest.raises(ValueError, match="has 256 tokens, but the model only 61"):
        load_vocabulary(tmp_path)
