"""Blocks: built from a config, two LayerNorms in each half, each half around a residual."""

import dataclasses

import pytest
import torch
from dilated_models.layers.blocks import SelfAttentionBlock
from dilated_models.layers.feed_forward import FeedForward
from dilated_models.layers.self_attention import DilatedSelfAttention
from torch import nn


@pytest.fixture
def x() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 45, 32, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("layer", [SelfAttentionBlock, DilatedSelfAttention, FeedForward])
def test_a_layer_is_built_from_the_config_of_a_model(config, x, layer):
    made = layer(config, device="cpu", dtype=torch.float64)
    assert made(x).shape == x.shape
    assert {p.dtype for p in made.parameters()} == {torch.float64}
    assert {p.device.type for p in layer(config, device="meta").parameters()} == {"meta"}


def test_options_of_the_config_reach_the_layers(config):
    config = dataclasses.replace(
        config,
        dropout=0.25,
        activation="gelu",
        layer_norm_eps=1e-3,
        head_offsets="blocked",
        padding="attended",
        backend="eager",
    )
    block = SelfAttentionBlock(config)
    assert [m.p for m in block.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    assert [m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)] == [1e-3] * 4
    assert block.attention.attention.config == config.attention
    assert config.attention.pattern == config.pattern
    assert (config.pattern.head_offsets, config.pattern.padding) == ("blocked", "attended")
    assert "activation='gelu'" in repr(block)


def test_a_block_is_two_residuals_around_normalised_inputs(config, x):
    block = SelfAttentionBlock(config, dtype=torch.float64)
    middle = x + block.attention(block.attention_norm(x), is_causal=True)
    expected = middle + block.feed_forward(block.feed_forward_norm(middle))
    assert torch.equal(block(x), expected)


def test_sub_layer_norms_stand_before_the_output_projections(config, x):
    seen = []
    block = SelfAttentionBlock(config, dtype=torch.float64)
    for linear in (block.attention.out_proj, block.feed_forward.fc2):
        linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    block(x)
    assert len(seen) == 2
    for inputs in seen:
        assert inputs.mean(-1).abs().max() < 1e-6
        assert (inputs.var(-1, unbiased=False) - 1).abs().max() < 0.05


def test_reset_parameters_draws_each_weight_anew(config):
    block = SelfAttentionBlock(config)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(float("nan"))
    block.reset_parameters()
    for name, parameter in block.named_parameters():
        assert parameter.isfinite().all(), name
        assert (parameter.std() > 0.05) == (parameter.ndim == 2), name
