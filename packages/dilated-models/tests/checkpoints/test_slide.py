"""GigaPath's slide encoder against results of the published code, and strict loading."""

import dataclasses

import pytest
import torch
from dilated_models.checkpoints import gigapath_state_dict, slide_encoder_from_gigapath
from dilated_models.slide.config import ARCHITECTURES, SlideEncoderConfig
from safetensors.torch import save_file


@pytest.fixture
def tiny(golden):
    return golden("gigapath_slide_encoder_tiny")


@pytest.mark.parametrize(
    ("file", "backend"),
    [(None, "eager"), ("safetensors", "auto"), ("model", "auto"), ("bare", "auto")],
)
def test_results_of_the_published_code(tiny, tmp_path, file, backend):
    config, weights, tensors = tiny
    source, path = weights, tmp_path / "slide_encoder.pth"
    if file == "safetensors":
        save_file(weights, path)
    elif file is not None:
        torch.save({"model": weights} if file == "model" else weights, path)
    if file is not None:
        source = path
    encoder = slide_encoder_from_gigapath(source, {**config, "backend": backend})
    assert not encoder.training
    assert (encoder.weights_sha256 is None) == (file is None)
    tiles, coords = tensors["input.tiles"], tensors["input.coords"]
    with torch.no_grad():
        embedding, layers = encoder(tiles, coords), encoder(tiles, coords, all_layers=True)
    torch.testing.assert_close(embedding, tensors["output.cls"], rtol=0, atol=2e-5)
    torch.testing.assert_close(layers, tensors["output.layers"], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("cls_token"), "cls_token is missing"),
        (lambda w: [w.pop(n) for n in list(w) if "inner_attn_ln" in n], "inner_attn_ln.* are miss"),
        (lambda w: w.update(head=torch.ones(3)), "head is not part of it"),
        (lambda w: w.update({"norm.bias": torch.ones(63)}), r"shape \(63,\) instead of \(64,\)"),
        (lambda w: w.update({"norm.bias": torch.ones(64).long()}), "is not floating"),
        (
            lambda w: w.update({"encoder.layers.2.ffn.fc1.bias": torch.ones(128)}),
            r"encoder.layers.2.ffn.fc1.bias is not part of it",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_refused(tiny, change, message):
    config, weights, _ = tiny
    weights = dict(weights)
    change(weights)
    with pytest.raises(ValueError, match=message):
        slide_encoder_from_gigapath(weights, config)


def test_the_published_table_of_positions_may_be_there(tiny):
    config, weights, _ = tiny
    weights = {**weights, "pos_embed": torch.zeros(1, 64 * 64 + 1, 64)}
    assert slide_encoder_from_gigapath(weights, config).config.slide_ngrids == 64


def test_weights_come_out_under_their_published_names(tiny):
    config, weights, _ = tiny
    out = gigapath_state_dict(slide_encoder_from_gigapath(weights, config))
    assert out.keys() == weights.keys()
    assert all(torch.equal(out[name], weights[name]) for name in weights)
    own = slide_encoder_from_gigapath(weights, config).state_dict()
    assert own.keys() != weights.keys()
    again = gigapath_state_dict(slide_encoder_from_gigapath(own, config))
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    with pytest.raises(ValueError, match="are not part of it"):
        slide_encoder_from_gigapath(own | weights, config)


def test_the_config_is_read_from_published_shapes_only(tiny):
    _, weights, _ = tiny
    with pytest.raises(ValueError, match="2 layers of width 64, which no published"):
        slide_encoder_from_gigapath(weights)
    with pytest.raises(TypeError, match="config is a list"):
        slide_encoder_from_gigapath(weights, [])
    with pytest.raises(ValueError, match="architecture is 'vit'"):
        slide_encoder_from_gigapath(weights, "vit")


def test_published_shapes_give_the_published_config(tiny, monkeypatch):
    config, weights, tensors = tiny
    published = SlideEncoderConfig(**config)
    monkeypatch.setitem(ARCHITECTURES, "tiny", dataclasses.replace(published, in_chans=7))
    for given in (None, "tiny"):
        if given == "tiny":
            monkeypatch.setitem(ARCHITECTURES, "tiny", published)
        encoder = slide_encoder_from_gigapath(weights, given)
        assert encoder.config == published
    with torch.no_grad():
        embedding = encoder(tensors["input.tiles"], tensors["input.coords"])
    torch.testing.assert_close(embedding, tensors["output.cls"], rtol=0, atol=2e-5)


def test_the_pattern_of_the_same_weights_follows_the_config(tiny):
    config, weights, tensors = tiny
    config = SlideEncoderConfig(**config)
    other = dataclasses.replace(config, segment_lengths=None, max_wsi_size=25_000)
    encoder = slide_encoder_from_gigapath(weights, other)
    assert encoder.config.pattern.segment_lengths == (1024, 1722, 2896, 4870, 8192)
    with torch.no_grad():
        embedding = encoder(tensors["input.tiles"], tensors["input.coords"])
    assert (embedding - tensors["output.cls"]).abs().max() > 1e-3


def test_dtype_and_device(tiny):
    config, weights, _ = tiny
    encoder = slide_encoder_from_gigapath(weights, config, dtype=torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
