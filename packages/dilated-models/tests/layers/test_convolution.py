"""The causal convolution: equal to conv1d, in parts, and per document."""

import dataclasses
import json

import pytest
import torch
from dilated_models import LongNetConfig, LongNetLM, load_model
from dilated_models.layers.blocks import SelfAttentionBlock
from dilated_models.layers.convolution import CausalConvolution, add_causal_convolution
from dilated_models.longnet.saving import save_model, write_config
from torch.nn.functional import conv1d, pad


@pytest.mark.parametrize("width", [1, 2, 4, 9])
@pytest.mark.parametrize("seq_len", [1, 3, 20])
def test_equals_conv1d_forward_and_backward(width, seq_len):
    x = torch.randn(2, seq_len, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 1, width, dtype=torch.float64, requires_grad=True)
    actual = add_causal_convolution(x, weight)
    expected = x + conv1d(pad(x.mT, (width - 1, 0)), weight, groups=5).mT
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(actual)
    for mine, theirs in zip(
        torch.autograd.grad(actual, (x, weight), upstream),
        torch.autograd.grad(expected, (x, weight), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width", [2, 4])
def test_a_text_in_parts_is_the_whole_text(width):
    x, weight = torch.randn(3, 12, 5), torch.randn(5, 1, width)
    whole = add_causal_convolution(x, weight)
    state = x.new_zeros(3, width - 1, 5)
    parts = []
    for part in x.split([1, 4, 1, 6], dim=1):
        parts.append(add_causal_convolution(part, weight, before=state))
        state = torch.cat((state, part), dim=1)[:, -(width - 1) :]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-6)


def test_each_document_starts_from_zeros():
    lengths = (1, 5, 2, 8)
    x, weight = torch.randn(16, 5), torch.randn(5, 1, 4)
    positions = torch.cat([torch.arange(n) for n in lengths])
    packed = add_causal_convolution(x, weight, positions=positions)
    alone = torch.cat([add_causal_convolution(part, weight) for part in x.split(lengths)])
    assert torch.equal(packed, alone)


def test_with_weights_of_zero_it_is_the_model_without(config, tokens):
    with_it = LongNetLM(dataclasses.replace(config, key_conv=4), dtype=torch.float64)
    with torch.no_grad():
        for block in with_it.blocks:
            block.key_conv.weight.zero_()
    plain = LongNetLM(config, dtype=torch.float64)
    state = with_it.state_dict()
    plain.load_state_dict({n: w for n, w in state.items() if "key_conv" not in n})
    assert len(plain.state_dict()) == len(state) - 2
    torch.testing.assert_close(with_it(tokens), plain(tokens), rtol=0, atol=1e-12)
    with_it(tokens).square().mean().backward()
    for block in with_it.blocks:
        assert block.key_conv.weight.shape == (32, 1, 4)
        assert block.key_conv.weight.grad.abs().amax(0).min() > 0  # every tap learns
    assert "CausalConvolution(width=4)" in repr(with_it)


@pytest.mark.parametrize("is_causal", [True, False])
def test_it_stands_between_the_first_layer_norm_and_attention_and_looks_back(config, is_causal):
    config = dataclasses.replace(config, key_conv=3)
    block = SelfAttentionBlock(config, dtype=torch.float64)
    with torch.no_grad():
        block.key_conv.weight.normal_()
    x = torch.randn(2, 20, 32, dtype=torch.float64)
    normed = block.attention_norm(x)
    middle = x + block.attention(
        normed + conv1d(pad(normed.mT, (2, 0)), block.key_conv.weight, groups=32).mT,
        is_causal=is_causal,
    )
    expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    torch.testing.assert_close(block(x, None, is_causal), expected, rtol=0, atol=1e-12)


def test_initialisation_on_meta_and_anew(config):
    wide = dataclasses.replace(config, d_model=4096, key_conv=4)
    layer = CausalConvolution(wide, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    layer.reset_parameters()
    # 16384 draws: the standard deviation is right to 4 times its own error.
    assert layer.weight.std().item() == pytest.approx(0.3, rel=4 / (2 * 16384) ** 0.5)
    block = SelfAttentionBlock(dataclasses.replace(config, key_conv=2))
    with torch.no_grad():
        block.key_conv.weight.fill_(float("nan"))
    block.reset_parameters()
    assert block.key_conv.weight.isfinite().all()


def test_saved_and_loaded(config, tokens, tmp_path):
    config = dataclasses.replace(config, key_conv=4)
    assert LongNetConfig.from_json(config.to_json()) == config
    model = LongNetLM(config)
    with torch.no_grad():
        model.blocks[1].key_conv.weight.normal_()
    write_config(tmp_path, {"model": config.to_dict(), "tokenizer": "bytes"})
    save_model(tmp_path, model)
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


def test_a_config_file_from_before_has_no_convolution(config, tokens, tmp_path):
    fields = config.to_dict()
    del fields["key_conv"]
    write_config(tmp_path, {"model": fields, "tokenizer": "bytes"})
    model = LongNetLM(config)
    save_model(tmp_path, model)
    assert "key_conv" not in json.loads((tmp_path / "config.json").read_text())["model"]
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-1, ValueError, "key_conv is -1; it must be at least 0"),
        (2.5, TypeError, r"key_conv is 2\.5; it must be an integer"),
        (True, TypeError, "key_conv is True; it must be an integer"),
    ],
)
def test_refusals(config, value, error, message):
    with pytest.raises(error, match=message):
        dataclasses.replace(config, key_conv=value)
