"""Inside PyTorch's own transformer layers the module computes what it computes alone.

The recipe of the README: `batch_first=True`, `enable_nested_tensor=False`, no warning.
"""

import warnings

import pytest
import torch
from dilated_core import DilatedPattern, MultiheadDilatedAttention
from dilated_core.testing import relative_error
from torch import nn

E, H, S = 24, 4, 40
BRANCHES = {"segment_lengths": [8, 32], "dilation_rates": [1, 4]}
PADDING = torch.arange(S) >= torch.tensor([[S], [25]])
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def host(*, replace=True, **options):
    settings = {"batch_first": True, "dtype": torch.float64, "dropout": 0.0} | options
    layer = nn.TransformerEncoderLayer(E, H, 48, **settings)
    if replace:
        layer.self_attn = MultiheadDilatedAttention.from_multihead_attention(
            layer.self_attn, **BRANCHES
        )
    return layer


def computed_directly(layer, x, **masks):
    """The layer written out (post-norm or pre-norm), with one call of the module itself."""

    def feed_forward(x):
        return layer.linear2(layer.activation(layer.linear1(x)))

    def attend(x):
        return layer.self_attn(x, x, x, **masks)

    if layer.norm_first:
        x = x + attend(layer.norm1(x))
        return x + feed_forward(layer.norm2(x))
    x = layer.norm1(x + attend(x))
    return layer.norm2(x + feed_forward(x))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
def test_the_recipe(mode, norm_first, has_padding, is_causal):
    layer = host(norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for copy in encoder.layers:
        for parameter in copy.parameters():
            nn.init.normal_(parameter, std=0.3)
    encoder.train(mode == "train")
    x = torch.randn(2, S, E, dtype=torch.float64, requires_grad=True)
    padding = PADDING if has_padding else None
    masks = {"mask": CAUSAL, "is_causal": True} if is_causal else {}
    with torch.set_grad_enabled(mode != "no_grad"):
        y = encoder(x, src_key_padding_mask=padding, **masks)
        expected = x
        for copy in encoder.layers:
            expected = computed_directly(
                copy, expected, is_causal=is_causal, key_padding_mask=padding
            )
    assert relative_error(y, expected) < 1e-13
    if mode != "no_grad":
        dout = torch.randn_like(y)
        wrt = [x, *encoder.parameters()]
        for actual, exact in zip(
            torch.autograd.grad(y, wrt, dout), torch.autograd.grad(expected, wrt, dout), strict=True
        ):
            assert relative_error(actual, exact) < 1e-12
    # PyTorch finds out by itself that a mask is causal.
    if is_causal:
        assert torch.equal(encoder(x, mask=CAUSAL, src_key_padding_mask=padding), encoder(
            x, src_key_padding_mask=padding, **masks
        ))  # fmt: skip


def test_it_is_dilated_attention_that_runs():
    """A position sees exactly those that the pattern lets it see."""
    x = torch.randn(2, S, E, dtype=torch.float64, requires_grad=True)
    y = host()(x)
    (gradient,) = torch.autograd.grad(y[0, 39] @ torch.randn(E, dtype=torch.float64), x)
    seen = gradient.abs().sum(-1) > 0
    counts = DilatedPattern(*BRANCHES.values()).materialize(S, H)
    assert torch.equal(seen[0], counts[:, 39].sum(0) > 0)
    assert not seen[1].any()


def test_pretrained_weights_in_a_dense_pattern_change_nothing():
    layer = host(replace=False)
    x = torch.randn(2, S, E, dtype=torch.float64)
    expected = layer(x, src_mask=CAUSAL, is_causal=True, src_key_padding_mask=PADDING)
    layer.self_attn = MultiheadDilatedAttention.from_multihead_attention(
        layer.self_attn, segment_lengths=[S], dilation_rates=[1]
    )
    y = layer(x, src_mask=CAUSAL, is_causal=True, src_key_padding_mask=PADDING)
    assert relative_error(y, expected) < 1e-13


def test_in_a_decoder_layer():
    """Its self-attention, causal; cross-attention stays PyTorch's."""
    layer = nn.TransformerDecoderLayer(E, H, 48, dropout=0.0, batch_first=True, dtype=torch.float64)
    x, memory = torch.randn(2, 2, S, E, dtype=torch.float64).unbind()
    expected = layer(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
    layer.self_attn = MultiheadDilatedAttention.from_multihead_attention(
        layer.self_attn, segment_lengths=[S], dilation_rates=[1]
    )
    y = nn.TransformerDecoder(layer, 1)(x, memory, tgt_mask=CAUSAL, tgt_is_causal=True)
    assert relative_error(y, expected) < 1e-13


def test_compiled_with_masks():
    encoder = nn.TransformerEncoder(host(), 1, enable_nested_tensor=False)
    x = torch.randn(2, S, E, dtype=torch.float64)
    compiled = torch.compile(encoder, backend="aot_eager", fullgraph=True)
    masks = {"mask": CAUSAL, "is_causal": True, "src_key_padding_mask": PADDING}
    assert relative_error(compiled(x, **masks), encoder(x, **masks)) < 1e-13
    with pytest.raises(RuntimeError, match="attn_mask has shape"):
        compiled(x, mask=CAUSAL.flip(0), is_causal=True, src_key_padding_mask=PADDING)


def test_batch_second_is_refused_where_it_shows():
    """Without masks, a layer built with `batch_first=False` calls the module as any other does."""
    with pytest.raises(ValueError, match=r"batch_first is False; .*with batch_first=True"):
        host(batch_first=False)
    layer = host(replace=False, batch_first=False)
    layer.self_attn = MultiheadDilatedAttention(E, H, **BRANCHES, dtype=torch.float64)
    x = torch.randn(S, 2, E, dtype=torch.float64)
    hint = r"It fits inputs of \(sequence, batch, embed_dim\).* with batch_first=True"
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 40\).*" + hint):
        layer(x, src_key_padding_mask=PADDING)
    with pytest.raises(
        ValueError, match=r"attn_mask has shape \(40, 40\) with is_causal=True.*" + hint
    ):
        layer(x, src_mask=CAUSAL, is_causal=True)
