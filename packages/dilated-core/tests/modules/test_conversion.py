"""Weights of `nn.MultiheadAttention` compute the same in a dense pattern, or are refused."""

import re

import pytest
import torch
from dilated_core import MultiheadConfig, MultiheadDilatedAttention
from dilated_core.testing import relative_error
from torch import nn

E, H, S = 24, 4, 20
DENSE = {"segment_lengths": [S], "dilation_rates": [1]}


def dense_attention(**options):
    """`nn.MultiheadAttention` with random biases too, which it initialises with 0."""
    attention = nn.MultiheadAttention(
        E, H, **({"batch_first": True, "dtype": torch.float64} | options)
    )
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    return attention


def dilated(**options):
    settings = {"layer_norm": False, "dtype": torch.float64} | DENSE
    return MultiheadDilatedAttention(E, H, **(settings | options))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("has_padding", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_dense_pattern_is_multihead_attention(is_packed, bias, has_padding, is_causal):
    """Output, and gradients of inputs and of every weight, with both layouts of weights."""
    dense = dense_attention(bias=bias)
    if not is_packed:  # as with kdim or vdim; PyTorch itself packs weights of equal width
        weights = dense.in_proj_weight.detach().chunk(3)
        dense._qkv_same_embed_dim = False
        dense.register_parameter("in_proj_weight", None)
        for name, weight in zip("qkv", weights, strict=True):
            dense.register_parameter(f"{name}_proj_weight", nn.Parameter(weight.clone()))
        assert "q_proj_weight" in dense.state_dict()
    mha = dilated(bias=bias)
    mha.load_multihead_attention(dense.state_dict())
    query, key, value = torch.randn(3, 2, S, E, dtype=torch.float64).unbind()
    inputs = [x.requires_grad_() for x in (query, key, value)]
    padding = torch.arange(S) >= torch.tensor([[S], [S - 7]]) if has_padding else None
    causal = torch.ones(S, S, dtype=torch.bool).triu(1) if is_causal else None
    expected = dense(
        *inputs, key_padding_mask=padding, attn_mask=causal, is_causal=is_causal, need_weights=False
    )[0]
    y = mha(*inputs, key_padding_mask=padding, is_causal=is_causal)
    assert relative_error(y, expected) < 1e-13
    dout = torch.randn_like(y)
    actual = torch.autograd.grad(y, [*inputs, *mha.parameters()], dout)
    exact = torch.autograd.grad(expected, [*inputs, *dense.parameters()], dout)
    for a, b in zip(actual[:3], exact[:3], strict=True):
        assert relative_error(a, b) < 1e-12
    got = dict(zip((n for n, _ in mha.named_parameters()), actual[3:], strict=True))
    want = dict(zip((n for n, _ in dense.named_parameters()), exact[3:], strict=True))
    kinds = ("weight", "bias") if bias else ("weight",)
    for kind in kinds:
        assert relative_error(got[f"out_proj.{kind}"], want[f"out_proj.{kind}"]) < 1e-12
        parts = torch.cat([got[f"{part}_proj.{kind}"] for part in "qkv"])
        if f"in_proj_{kind}" in want:
            packed = want[f"in_proj_{kind}"]
        else:
            packed = torch.cat([want[f"{part}_proj_{kind}"] for part in "qkv"])
        assert relative_error(parts, packed) < 1e-12


@pytest.mark.parametrize("bias", [False, True])
def test_built_from_a_module(bias):
    dense = dense_attention(bias=bias, dropout=0.25, dtype=torch.bfloat16).eval()
    before = {name: x.clone() for name, x in dense.state_dict().items()}
    mha = MultiheadDilatedAttention.from_multihead_attention(dense, **DENSE, backend="eager")
    assert mha.config == MultiheadConfig(
        embed_dim=E, num_heads=H, bias=bias, layer_norm=False,
        device=torch.device("cpu"), dtype=torch.bfloat16,
    )  # fmt: skip
    assert (mha.attention.config.dropout, mha.attention.config.backend) == (0.25, "eager")
    assert not mha.training
    assert MultiheadDilatedAttention.from_multihead_attention(dense.train(), **DENSE).training
    copied = [mha.q_proj.weight, mha.k_proj.weight, mha.v_proj.weight]
    assert torch.equal(torch.cat(copied), dense.in_proj_weight)
    assert torch.equal(mha.out_proj.weight, dense.out_proj.weight)
    # The copies are the module's own.
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.zero_()
    for name, x in dense.state_dict().items():
        assert torch.equal(x, before[name])


def test_parameters_keep_their_dtype_and_place():
    mha = dilated(dtype=torch.float16)
    storages = [p.data_ptr() for p in mha.parameters()]
    mha.load_multihead_attention(dense_attention().state_dict())
    assert {p.dtype for p in mha.parameters()} == {torch.float16}
    assert [p.data_ptr() for p in mha.parameters()] == storages
    assert all(p.requires_grad for p in mha.parameters())


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"layer_norm": True}, {}, "layer_norm is True; nn.MultiheadAttention has no LayerNorm"),
        ({"num_kv_heads": 2}, {}, "num_kv_heads is 2 and num_heads 4; nn.MultiheadAttention has"),
        ({"device": "meta"}, {}, "the module is on the meta device"),
        ({}, {"bias_k": torch.ones(1, 1, E)}, "the state dict has bias_k; MultiheadDilated"),
        ({}, {"in_proj_bias": None}, "the state dict lacks in_proj_bias and the module has biases"),
        ({"bias": False}, {}, "the state dict has in_proj_bias and the module bias=False; build"),
        ({}, {"in_proj_weight": torch.ones(3 * E, 8)}, "in_proj_weight has shape (72, 8); it must"),
        ({}, {"in_proj_bias": torch.ones(E)}, "in_proj_bias has shape (24,); it must be (72,) for"),
        ({}, {"in_proj_weight": None}, "it must have exactly q_proj_weight, k_proj_weight, v_proj"),
        ({}, {"q_proj_weight": torch.ones(E, E)}, "it must have exactly in_proj_weight, out_proj."),
        ({}, {"scale": torch.ones(())}, "it must have exactly in_proj_weight, out_proj.weight, in"),
    ],
)
def test_what_has_no_counterpart(options, change, message):
    state = {
        name: x for name, x in (dense_attention().state_dict() | change).items() if x is not None
    }
    mha = dilated(**options)
    before = [p.clone() for p in mha.parameters()]
    with pytest.raises(ValueError, match=re.escape(message)):
        mha.load_multihead_attention(state)
    if not options.get("device"):
        assert all(map(torch.equal, before, mha.parameters()))


def test_an_entry_that_is_no_tensor():
    state = dense_attention().state_dict() | {"in_proj_bias": [0.0]}
    with pytest.raises(TypeError, match="in_proj_bias is a list; it must be a tensor"):
        dilated().load_multihead_attention(state)


def test_keys_of_the_layer_around_it():
    layer = nn.TransformerEncoderLayer(E, H, batch_first=True)
    with pytest.raises(ValueError, match=r"has the keys linear1\.bias.*as nn.MultiheadAttention"):
        dilated().load_multihead_attention(layer.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_first": False}, "batch_first is False; .* with batch_first=True"),
        ({"add_zero_attn": True}, "add_zero_attn is True"),
        ({"add_bias_kv": True}, "the state dict has bias_k"),
        ({"kdim": 8}, r"k_proj_weight has shape \(24, 8\); it must be \(24, 24\)"),
    ],
)
def test_modules_that_cannot_be_replaced(options, message):
    with pytest.raises(ValueError, match=message):
        MultiheadDilatedAttention.from_multihead_attention(dense_attention(**options), **DENSE)


def test_arguments_of_the_replacement():
    build = MultiheadDilatedAttention.from_multihead_attention
    with pytest.raises(TypeError, match=r"attention is a Linear; it must be an nn.MultiheadAttent"):
        build(nn.Linear(2, 2), **DENSE)
    with pytest.raises(TypeError, match="no argument 'causal'; it is called is_causal"):
        build(dense_attention(), **DENSE, causal=True)
    with pytest.raises(ValueError, match="layer_norm is True"):
        build(dense_attention(), **DENSE, layer_norm=True)


@pytest.mark.parametrize(
    ("error", "message", "convert"),
    [
        (
            TypeError,
            "dtype torch.complex64; it must be a floating",
            lambda x: x.to(torch.complex64),
        ),
        (TypeError, "dtype torch.int64; it must be a floating", torch.Tensor.long),
        (ValueError, "is on meta and holds no values", lambda x: x.to("meta")),
    ],
)
def test_weights_are_real_numbers(error, message, convert):
    state = torch.nn.MultiheadAttention(16, 4).state_dict()
    module = MultiheadDilatedAttention(
        16, 4, segment_lengths=[4], dilation_rates=[1], layer_norm=False
    )
    with pytest.raises(error, match=message):
        module.load_multihead_attention({name: convert(x) for name, x in state.items()})
    for other in (None, [1]):
        with pytest.raises(TypeError, match=r"state_dict is a \w+; it must be a dict"):
            module.load_multihead_attention(other)


@pytest.mark.parametrize("value", ["x", 1, [[0.0] * 16]])
def test_inputs_and_masks_are_tensors(value):
    module = MultiheadDilatedAttention(16, 4, segment_lengths=[4], dilation_rates=[1])
    x = torch.zeros(1, 1, 16)
    with pytest.raises(TypeError, match=r"query is a \w+; it must be a tensor"):
        module(value, x, x)
    for name in ("attn_mask", "key_padding_mask"):
        with pytest.raises(TypeError, match=name + r" is a \w+; it must be a tensor"):
            module(x, x, x, **{name: value})
