"""LongNetConfig: every refusal by its text, and JSON there and back."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM

GOOD: dict[str, Any] = {
    "num_tokens": 256,
    "d_model": 32,
    "nhead": 4,
    "num_decoder_layers": 2,
    "dim_feedforward": 64,
    "segment_lengths": (8, 16),
    "dilation_rates": (1, 2),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_encoder_layers": -1}, ValueError, "num_encoder_layers is -1; it must be at least 0"),
        ({"num_tokens": 0}, ValueError, "num_tokens is 0; it must be at least 1"),
        ({"d_model": 32.0}, TypeError, r"d_model is 32\.0; it must be an integer"),
        ({"nhead": True}, TypeError, "nhead is True; it must be an integer"),
        ({"nhead": 5}, ValueError, "nhead is 5 and d_model 32; nhead must divide d_model, so that"),
        ({"nhead": 32}, ValueError, "head_dim, d_model / nhead, is 1; it must be even, since"),
        ({"num_kv_heads": 3}, ValueError, "num_kv_heads must divide"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; it must be at least 1"),
        ({"drop_path": 0.1}, TypeError, "no argument 'drop_path'; it is called drop_path_rate"),
        (
            {"drop_path_rate": 1},
            ValueError,
            "drop_path_rate is 1; it must be at least 0 and below 1",
        ),
        ({"num_decoder_layers": 0}, ValueError, "num_decoder_layers is 0; it must be at least 1"),
        ({"dim_feedforward": -2}, ValueError, "dim_feedforward is -2; it must be at least 1"),
        (
            {"activation": "swish"},
            ValueError,
            "activation is 'swish'; it must be one of 'relu'",
        ),
        ({"positions": "rope"}, ValueError, "positions is 'rope'; it must be one of 'xpos', 'rota"),
        (
            {"positions": "alibi", "local_window": 4},
            ValueError,
            "ALiBi needs dilated attention with",
        ),
        ({"dropout": 1.0}, ValueError, r"dropout is 1\.0; it must be at least 0 and below 1"),
        ({"dropout": "0.1"}, TypeError, "dropout is '0.1'; it must be a number"),
        ({"layer_norm_eps": 0.0}, ValueError, r"layer_norm_eps is 0\.0; it must be above 0"),
        ({"xpos_scale_base": -1}, ValueError, "xpos_scale_base is -1; it must be above 0"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings is 1; it must be True or False"),
        ({"scale_embedding": "False"}, TypeError, "scale_embedding is 'False'; it must be True or"),
        ({"final_layer_norm": None}, TypeError, "final_layer_norm is None; it must be True or"),
        ({"activation_checkpointing": 0}, TypeError, "activation_checkpointing is 0; it must be"),
        ({"backend": None}, TypeError, "backend is None; it must be 'auto' or the name of"),
        (
            {"causal": True},
            TypeError,
            "no argument 'causal'; it is called is_causal, and is",
        ),
        ({"softmax_scale": 1.0}, TypeError, "no argument 'softmax_scale'; it is called scale, and"),
        ({"num_heads": 4}, TypeError, "no argument 'num_heads'; it is called nhead"),
        ({"hidden_size": 4}, TypeError, "no argument 'hidden_size'; it is called d_model"),
        ({"d_modle": 4}, TypeError, "no argument 'd_modle'; its arguments are num_tokens, d_model"),
        ({"segment_lengths": (8,)}, ValueError, "segment_lengths has 1 entries and dilation_rates"),
        ({"segment_lengths": (0, 8)}, ValueError, "segment_lengths"),
        ({"head_offsets": "random"}, ValueError, "head_offsets"),
        ({"padding": "same"}, ValueError, "padding"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LongNetConfig(**GOOD | change)
    with pytest.raises(error, match=message):
        LongNetLM(**GOOD | change)


def test_json_round_trip(tmp_path: Path) -> None:
    options = {"dropout": 0.25, "head_offsets": "blocked", "tie_embeddings": True}
    config = LongNetConfig(**GOOD, **options, num_kv_heads=2, drop_path_rate=0.1)
    assert LongNetConfig.from_json(config.to_json()) == config
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert LongNetConfig.from_json(path) == config
    assert hash(LongNetConfig.from_dict(config.to_dict())) == hash(config)


def test_numbers_of_any_library_become_plain_ones() -> None:
    config = LongNetConfig(
        num_tokens=np.int64(256),
        d_model=np.int32(32),
        nhead=4,
        segment_lengths=np.array([8, 16]),
        dilation_rates=[np.int64(1), 2],
        dropout=np.float32(0.25),
        layer_norm_eps=1,
    )
    assert type(config.num_tokens) is type(config.d_model) is int
    assert type(config.dropout) is type(config.layer_norm_eps) is float
    assert LongNetConfig.from_json(config.to_json()) == config


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="LongNetConfig has no argument 'd_modle'; its arguments"):
        LongNetConfig.from_dict(GOOD | {"d_modle": 3})
    with pytest.raises(TypeError, match="num_tokens is missing; it must be given, as the vocab"):
        LongNetConfig.from_dict({"d_model": 32})
    with pytest.raises(TypeError, match="the configuration is a JSON list; it must be an object"):
        LongNetConfig.from_json("[1]")


def test_it_is_frozen() -> None:
    config = LongNetConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 64  # type: ignore[misc]


def test_the_model_shows_the_options_of_the_config() -> None:
    """What help() and docs/api print: names, types and defaults."""
    of_model = inspect.signature(LongNetLM).parameters
    of_config = inspect.signature(LongNetConfig).parameters
    assert [*of_config, "group", "device", "dtype"] == list(of_model)
    for name, parameter in of_config.items():
        assert of_model[name] == parameter, name


def test_the_model_takes_a_config_or_its_fields() -> None:
    config = LongNetConfig(**GOOD)
    for model in (
        LongNetLM(config),
        LongNetLM(config=config, device="cpu"),
        LongNetLM.from_config(config),
        LongNetLM(**GOOD),
        LongNetLM(**GOOD, device="cpu", dtype=torch.float32),
    ):
        assert model.config == config
        assert model.embedding.weight.dtype == torch.float32
    assert LongNetLM(config, dtype=torch.float64).embedding.weight.dtype == torch.float64
    with pytest.raises(
        TypeError,
        match=r"^LongNetLM has no argument 'nhead'; it belongs in config: "
        r"dataclasses\.replace\(config, nhead=\.\.\.\)\.$",
    ):
        LongNetLM(config, nhead=2)
    with pytest.raises(TypeError, match="config is a dict; it must be a LongNetConfig"):
        LongNetLM(config=GOOD)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^LongNetLM: missing a required argument: 'num_tokens'"):
        LongNetLM(d_model=32)
    with pytest.raises(TypeError, match=r"^LongNetLM: too many positional arguments"):
        LongNetLM(256)
    with pytest.raises(TypeError, match="LongNetLM has no argument 'causal'; it is called is_caus"):
        LongNetLM(**GOOD, causal=True)
    with pytest.raises(TypeError, match=r"dtype is torch\.int64; it must be a floating-point"):
        LongNetLM(config, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "layers", "d_model", "nhead", "parameters"),
    # A block has 12·d² weights and 23·d biases and norms; then the final norm and 2000·d.
    [
        ("base", 12, 768, 12, 86_684_160),
        ("medium", 24, 1024, 16, 304_605_184),
        ("large", 24, 1536, 16, 683_400_192),
        ("xl", 32, 2560, 32, 2_523_591_680),
    ],
)
def test_presets_are_the_papers_sizes(name, layers, d_model, nhead, parameters) -> None:
    config = LongNetConfig.from_preset(name, num_tokens=1000)
    assert (config.num_decoder_layers, config.d_model, config.nhead) == (layers, d_model, nhead)
    assert config.dim_feedforward == 4 * d_model
    assert config.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert config.dilation_rates == (1, 2, 4, 6, 12)
    model = LongNetLM(config, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    with pytest.raises(ValueError, match="name is '125m'; it must be one of 'base', 'medium'"):
        LongNetConfig.from_preset("125m", num_tokens=1000)
    with pytest.raises(TypeError, match="num_tokens is missing"):
        LongNetConfig.from_preset(name)
    assert LongNetConfig.from_preset(name, num_tokens=9, nhead=8).nhead == 8


def test_gamma() -> None:
    assert LongNetConfig(**GOOD).gamma_init == pytest.approx(math.sqrt(math.log(4)))
