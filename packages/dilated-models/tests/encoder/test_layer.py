"""The encoder layer: MAGNETO's halves, PyTorch's stack around it, dropped paths."""

import copy
import math

import pytest
import torch
from dilated_models.encoder.config import EncoderConfig, EncoderLayerConfig
from dilated_models.encoder.layer import DilatedTransformerEncoderLayer
from dilated_models.layers.drop_path import drop_path
from torch import nn

OPTIONS = {"dim_feedforward": 48, "segment_lengths": [6, 16, 40], "dilation_rates": [1, 3, 4]}


@pytest.fixture
def layer() -> DilatedTransformerEncoderLayer:
    torch.manual_seed(0)
    return DilatedTransformerEncoderLayer(32, 4, **OPTIONS, dtype=torch.float64)


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 45, 32, generator=generator, dtype=torch.float64)


def test_a_layer_is_two_residuals_around_normalised_inputs(layer, x):
    attended = layer.self_attn_layer_norm(x)
    middle = x + layer.self_attn(attended, attended, attended)
    expected = middle + layer.ffn(layer.final_layer_norm(middle))
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["plain", "causal", "padding"])
def test_a_layer_works_inside_pytorchs_encoder(layer, x, kind, training, batch_first):
    """Its fast path for inference included, which needs a layer of PyTorch and is left out."""
    if not batch_first:
        weights = layer.state_dict()
        layer = DilatedTransformerEncoderLayer(
            32, 4, **OPTIONS, dtype=torch.float64, batch_first=False
        )
        layer.load_state_dict(weights)
        expected = DilatedTransformerEncoderLayer(32, 4, **OPTIONS, dtype=torch.float64)
        expected.load_state_dict(weights)
        assert torch.equal(layer(x.transpose(0, 1)), expected(x).transpose(0, 1))
        x = x.transpose(0, 1)
    with pytest.warns(UserWarning, match="was not TransformerEncoderLayer"):
        stack = nn.TransformerEncoder(layer, 3).train(training)
    mask, padding = None, None
    if kind == "causal":
        mask = nn.Transformer.generate_square_subsequent_mask(45, dtype=x.dtype)
    if kind == "padding":
        padding = torch.zeros(2, 45, dtype=torch.bool)
        padding[1, 40:] = True
    with torch.set_grad_enabled(training):
        got = stack(x, mask=mask, src_key_padding_mask=padding)
        expected = x
        for part in stack.layers:
            expected = part(
                expected, src_mask=mask, src_key_padding_mask=padding, is_causal=kind == "causal"
            )
    assert torch.equal(got, expected)
    assert got.requires_grad == training
    if kind == "causal":
        changed, sequence = x.clone(), 1 if batch_first else 0
        changed.narrow(sequence, 30, 15).add_(1)
        difference = (stack(changed, mask=mask) - got).narrow(sequence, 0, 30)
        assert difference.eq(0).all()


def test_what_is_required_may_be_positional():
    layer = DilatedTransformerEncoderLayer(32, 4, [6, 16, 40], [1, 3, 4], dim_feedforward=48)
    assert layer.config == EncoderLayerConfig(d_model=32, nhead=4, **OPTIONS)


def test_other_masks_are_refused(layer, x):
    with pytest.raises(ValueError, match="the pattern decides"):
        layer(x, src_mask=torch.zeros(45, 45))
    with pytest.raises(TypeError, match="is an option of the constructor"):
        layer(x, dropout=0.1)
    with pytest.raises(TypeError, match="it is called nhead"):
        DilatedTransformerEncoderLayer(32, num_heads=4, **OPTIONS)


def test_inference_in_parts_is_the_whole(layer, x, monkeypatch):
    monkeypatch.setattr("dilated_models.encoder.halves._ROWS_AT_ONCE", 7)
    layer.eval()
    with torch.no_grad():
        parts = layer(x)
    torch.testing.assert_close(parts, layer(x).detach(), rtol=0, atol=1e-12)


def test_options_reach_the_parts():
    config = EncoderLayerConfig(
        d_model=32,
        nhead=4,
        **OPTIONS,
        dropout=0.1,
        attention_dropout=0.2,
        activation_dropout=0.3,
        activation="relu",
        layer_norm_eps=1e-3,
        head_offsets="blocked",
        padding="attended",
        backend="eager",
    )
    layer = DilatedTransformerEncoderLayer(config, dtype=torch.float64)
    assert (layer.dropout.p, layer.ffn.dropout.p) == (0.1, 0.3)
    assert layer.self_attn.attention.config == config.attention
    assert config.attention.dropout == 0.2
    assert (config.pattern.head_offsets, config.pattern.padding) == ("blocked", "attended")
    assert [m.eps for m in layer.modules() if isinstance(m, nn.LayerNorm)] == [1e-3] * 4
    assert layer.ffn.activation == "relu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nhead": 5}, "nhead must divide d_model"),
        ({"dropout": 1.0}, "below 1"),
        ({"drop_path": -0.1}, "at least 0"),
        ({"activation": "swish"}, "must be one of"),
        ({"segment_lengths": [4]}, "equal length"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        EncoderLayerConfig(**({"d_model": 32, "nhead": 4} | OPTIONS | change))


def test_paths_grow_and_weights_are_drawn_with_the_gain_of_the_stack():
    config = EncoderConfig(d_model=32, nhead=4, num_layers=5, **OPTIONS, drop_path_rate=0.4)
    rates = [config.layer(i).drop_path for i in range(5)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert config.layer(3).gamma_init == math.sqrt(math.log(10))
    layer = DilatedTransformerEncoderLayer(config.layer(0))
    bound = math.sqrt(math.log(10)) * math.sqrt(6 / (32 + 48))
    assert 0.95 * bound < layer.ffn.fc1.weight.abs().max() <= bound


def test_dropped_paths_are_whole_sequences_with_the_mean_kept():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = drop_path(x, 0.25)
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y.amin((1, 2)), y.amax((1, 2)))
    assert y.mean() == pytest.approx(1, abs=0.04)
    starts = torch.arange(0, 8001, 4)
    packed = drop_path(torch.ones(8000, 3), 0.25, starts).view(2000, 4, 3)
    assert torch.equal(packed.amin((1, 2)), packed.amax((1, 2)))
    assert packed.mean() == pytest.approx(1, abs=0.05)


def test_a_layer_drops_paths_in_training_only(layer, x):
    layer = DilatedTransformerEncoderLayer(32, 4, **OPTIONS, drop_path=0.999999)
    x = x.float()
    assert torch.equal(layer(x), x)  # both halves
    assert not torch.equal(copy.deepcopy(layer).eval()(x), x)
