"""Torchscale's LongNet decoders against results of the published code, and their options."""

import pytest
import torch
from dilated_models.checkpoints import decoder_from_torchscale
from dilated_models.checkpoints.decoder import longnet_config
from safetensors.torch import save_file

NAMES = ["torchscale_longnet_decoder", "torchscale_longnet_decoder_xpos"]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_published_code(golden, name, backend):
    config, weights, tensors = golden(name)
    model = decoder_from_torchscale(weights, config, backend=backend)
    assert not model.training
    with torch.no_grad():
        logits = model(tensors["input.tokens"])
    torch.testing.assert_close(logits, tensors["output.logits"], rtol=0, atol=2e-5)


def test_files_prefixes_and_weights_stored_once(golden, tmp_path):
    config, weights, tensors = golden(NAMES[1])
    shared = {name: w for name, w in weights.items() if name != "output_projection.weight"}
    prefixed = {f"decoder.{name}": w for name, w in weights.items()}
    torch.save({"model": prefixed}, tmp_path / "decoder.pt")
    save_file(shared, tmp_path / "decoder.safetensors")
    lists = {name: str(config[name]) for name in ("segment_length", "dilated_ratio")}
    tokens = tensors["input.tokens"][:, :70]
    with torch.no_grad():
        expected = decoder_from_torchscale(weights, config)(tokens)
        for source in (prefixed, shared, *tmp_path.iterdir()):
            model = decoder_from_torchscale(source, config | lists)
            assert model.output.weight is model.embedding.weight
            assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer_norm.weight"), "layer_norm.weight is missing"),
        (lambda w: w.update({"embed_positions.weight": torch.ones(3)}), "embed_pos.* not part"),
        (lambda w: w.update({"layer_norm.bias": torch.ones(3)}), r"\(3,\) instead of \(64,\)"),
        (lambda w: w.update({"output_projection.weight": torch.ones(128, 64)}), "must be equal"),
        (
            lambda w: w.update({"layers.0.self_attn.xpos.scale": torch.ones(4)}),
            "other constants than xPos",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named_and_refused(golden, change, message):
    config, weights, _ = golden(NAMES[1])
    weights = dict(weights)
    change(weights)
    with pytest.raises(ValueError, match=message):
        decoder_from_torchscale(weights, config)


def test_xpos_scales_are_extra_without_xpos(golden):
    config, _, _ = golden(NAMES[0])
    _, weights, _ = golden(NAMES[1])
    with pytest.raises(ValueError, match=r"xpos.scale, .* are not part of it"):
        decoder_from_torchscale(weights, config)


def test_every_option_is_honoured_refused_or_without_effect(golden):
    config, _, _ = golden(NAMES[0])
    own = longnet_config(config)
    assert (own.num_tokens, own.d_model, own.nhead) == (128, 64, 8)
    refused = {
        "subln": False,
        "deepnorm": True,
        "decoder_normalize_before": False,
        "moe_freq": 2,
        "multiway": True,
        "layernorm_embedding": True,
        "no_output_layer": True,
        "rel_pos_buckets": 32,
        "drop_path_rate": 0.1,
        "attention_dropout": 0.1,
        "seq_parallel": True,
        "dropout": 0.1,
        "activation_fn": "swish",
        "segment_length": None,
        "dilated_ratio": "__import__('os')",
    }
    for name, value in refused.items():
        with pytest.raises(ValueError, match=r"must be|must have"):
            longnet_config(config | {name: value})
    honoured = {
        "layernorm_eps": (1e-3, "layer_norm_eps", 1e-3),
        "no_scale_embedding": (False, "scale_embedding", True),
        "activation_fn": ("relu", "activation", "relu"),
        "checkpoint_activations": (True, "activation_checkpointing", True),
        "share_decoder_input_output_embed": (False, "tie_embeddings", False),
        "xpos_scale_base": (256, "xpos_scale_base", 256.0),
    }
    for name, (value, field, expected) in honoured.items():
        assert getattr(longnet_config(config | {name: value}), field) == expected
    with pytest.raises(TypeError, match="has no argument 'decoder_heads'"):
        longnet_config(config | {"decoder_heads": 8})
    with pytest.raises(TypeError, match=r"give vars\(config\)"):
        decoder_from_torchscale({}, object())
