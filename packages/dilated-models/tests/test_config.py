"""LongNetConfig: every refusal by its text, and JSON there and back."""

import dataclasses
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
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
        ({"num_encoder_layers": 12}, ValueError, "decoder-only, so leave num_encoder_layers at 0"),
        ({"num_encoder_layers": -1}, ValueError, "num_encoder_layers must be at least 0, got -1"),
        ({"num_tokens": 0}, ValueError, "num_tokens must be at least 1, got 0"),
        ({"d_model": 32.0}, TypeError, r"d_model must be an integer, got 32\.0"),
        ({"nhead": True}, TypeError, "nhead must be an integer, got True"),
        ({"nhead": 5}, ValueError, "nhead must divide d_model, got d_model=32 and nhead=5"),
        ({"nhead": 32}, ValueError, "d_model / nhead must be even, got 1"),
        ({"num_decoder_layers": 0}, ValueError, "num_decoder_layers must be at least 1, got 0"),
        ({"dim_feedforward": -2}, ValueError, "dim_feedforward must be at least 1, got -2"),
        ({"activation": "swish"}, ValueError, "activation must be one of 'relu', 'gelu', got"),
        ({"positions": "alibi"}, ValueError, "positions must be one of 'xpos', 'rotary', 'none'"),
        ({"dropout": 1.0}, ValueError, r"dropout must be at least 0 and below 1, got 1\.0"),
        ({"dropout": "0.1"}, TypeError, "dropout must be a finite number, got '0.1'"),
        ({"layer_norm_eps": 0.0}, ValueError, r"layer_norm_eps must be above 0, got 0\.0"),
        ({"xpos_scale_base": -1}, ValueError, "xpos_scale_base must be above 0, got -1"),
        ({"tie_embeddings": 1}, TypeError, "tie_embeddings must be True or False, got 1"),
        ({"backend": None}, TypeError, "backend must be a name such as 'auto', got None"),
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
    config = LongNetConfig(**GOOD, dropout=0.25, head_offsets="blocked", tie_embeddings=True)
    assert LongNetConfig.from_json(config.to_json()) == config
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert LongNetConfig.from_json(path) == config
    assert hash(LongNetConfig.from_dict(config.to_dict())) == hash(config)


def test_from_dict_refuses_what_it_does_not_know() -> None:
    with pytest.raises(TypeError, match="unknown configuration name 'd_modle'; known names are"):
        LongNetConfig.from_dict(GOOD | {"d_modle": 3})
    with pytest.raises(TypeError, match="lacks num_tokens"):
        LongNetConfig.from_dict({"d_model": 32})
    with pytest.raises(TypeError, match="a configuration is a JSON object, got list"):
        LongNetConfig.from_json("[1]")


def test_it_is_frozen() -> None:
    config = LongNetConfig(**GOOD)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 64  # type: ignore[misc]


def test_the_model_takes_the_same_arguments_with_the_same_defaults() -> None:
    of_model = inspect.signature(LongNetLM).parameters
    of_config = inspect.signature(LongNetConfig).parameters
    assert [*of_config, "device", "dtype"] == list(of_model)
    for name, parameter in of_config.items():
        assert of_model[name].default == parameter.default, name


def test_gamma() -> None:
    assert LongNetConfig(**GOOD).gamma_init == pytest.approx(math.sqrt(math.log(4)))
