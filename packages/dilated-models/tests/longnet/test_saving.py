"""Model files: whole or absent, exact, and strict when read."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.longnet.saving import (
    load_model,
    load_vocabulary,
    read_config,
    save_model,
    write_config,
)
from safetensors.torch import load_file, save_file


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request, tmp_path: Path, config: LongNetConfig) -> tuple[Path, LongNetLM]:
    config = dataclasses.replace(config, num_tokens=256, tie_embeddings=request.param)
    model = LongNetLM(config)
    write_config(tmp_path, {"model": config.to_dict(), "tokenizer": "bytes"})
    save_model(tmp_path, model)
    return tmp_path, model


def test_loads_what_was_saved(saved, tokens):
    folder, model = saved
    loaded = load_model(folder)
    assert torch.equal(loaded(tokens), model(tokens))
    assert not loaded.training
    assert loaded.config == model.config
    assert (loaded.output.weight is loaded.embedding.weight) is model.config.tie_embeddings
    names = set(load_file(folder / "model.safetensors"))
    assert ("output.weight" in names) is not model.config.tie_embeddings


def test_missing_files(tmp_path, config):
    with pytest.raises(
        FileNotFoundError, match=r"has no config\.json; it must be the --out folder of"
    ):
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
    with pytest.raises(ValueError, match="has format 2; it must have format 1 for this version"):
        load_model(folder)


def test_an_unknown_option(saved):
    folder, model = saved
    write_config(folder, {"model": model.config.to_dict() | {"moe": 1}, "tokenizer": "bytes"})
    with pytest.raises(ValueError, match="LongNetConfig has no argument 'moe'"):
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
    with pytest.raises(ValueError, match="has 256 tokens and the model 61; it must have no more"):
        load_vocabulary(tmp_path)


def test_a_flipped_bit_and_another_runs_weights_are_refused(saved):
    folder, model = saved
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-3] ^= 64
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="is damaged: its checksum is wrong"):
        load_model(folder)
    save_model(folder, model, run_id="another")
    with pytest.raises(ValueError, match="belongs to another run than its folder"):
        load_model(folder)
    content = {"model": model.config.to_dict(), "tokenizer": "bytes", "run_id": "another"}
    write_config(folder, content)
    load_model(folder)
    state = {k: v for k, v in model.state_dict().items() if k != "output.weight"}
    if not model.config.tie_embeddings:
        state["output.weight"] = model.output.weight.detach().clone()
    save_file(state, path)  # by another program: no checksum and no run
    load_model(folder)


@pytest.mark.parametrize("change", [{"num_tokens": 10**12}, {"num_decoder_layers": 10**7}])
def test_a_config_of_a_gigantic_model_is_refused_at_once(saved, change):
    folder, model = saved
    content = {"model": model.config.to_dict() | change, "tokenizer": "bytes"}
    write_config(folder, content)
    with pytest.raises(
        ValueError, match=r"the model of config\.json has \d{11,} parameters and the"
    ):
        load_model(folder)


def test_names_that_are_not_utf8(saved):
    folder, model = saved
    strange = folder / os.fsdecode(b"run\xff")
    try:
        strange.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    write_config(strange, {"model": model.config.to_dict(), "tokenizer": "bytes"})
    save_model(strange, model)
    assert load_model(strange).config == model.config
