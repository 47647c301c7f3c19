"""The modules are projections around the oracle; their arguments are honoured or refused."""

import copy
import math
import pickle
from importlib.metadata import entry_points

import pytest
import torch
from dilated_core import (
    DilatedAttention,
    DilatedAttentionConfig,
    DilatedPattern,
    DynamicDilatedAttention,
    MultiheadConfig,
    MultiheadDilatedAttention,
    create_dilated_attention,
    create_multihead_dilated_attention,
    dilated_attention,
    reference_dilated_attention,
)
from dilated_core.testing import relative_error
from torch import nn

LENGTHS, RATES = [8, 32], [1, 4]
PATTERN = DilatedPattern(LENGTHS, RATES)


def _multihead(**options):
    settings = {
        "embed_dim": 24,
        "num_heads": 4,
        "segment_lengths": LENGTHS,
        "dilation_rates": RATES,
    }
    return MultiheadDilatedAttention(**(settings | options))


@pytest.mark.parametrize("is_causal", [False, True])
def test_attention_module_is_the_function(is_causal):
    q, k, v = torch.randn(3, 2, 40, 4, 6).unbind()
    module = DilatedAttention(LENGTHS, RATES, scale=0.3, head_offsets="blocked", backend="eager")
    pattern = DilatedPattern(LENGTHS, RATES, head_offsets="blocked")
    expected = dilated_attention(q, k, v, pattern, is_causal=is_causal, scale=0.3, backend="eager")
    assert torch.equal(module(q, k, v, is_causal=is_causal), expected)
    assert torch.equal(module(q, k, v, is_causal), expected)


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_multihead_is_projections_around_the_oracle(bias, layer_norm, num_kv_heads):
    mha = _multihead(
        bias=bias,
        layer_norm=layer_norm,
        num_kv_heads=num_kv_heads,
        scale=0.5,
        dtype=torch.float64,
    )
    for parameter in mha.parameters():
        nn.init.normal_(parameter)
    query, key, value = torch.randn(3, 2, 40, 24, dtype=torch.float64).unbind()
    q, k, v = (
        (x @ p.weight.T + (p.bias if bias else 0)).view(2, 40, -1, 6)
        for x, p in ((query, mha.q_proj), (key, mha.k_proj), (value, mha.v_proj))
    )
    out = reference_dilated_attention(q, k, v, PATTERN, is_causal=True, scale=0.5).reshape(
        2, 40, 24
    )
    if layer_norm:
        out = (out - out.mean(-1, keepdim=True)) / (out.var(-1, False, keepdim=True) + 1e-5).sqrt()
        out = out * mha.layer_norm.weight + mha.layer_norm.bias
    expected = out @ mha.out_proj.weight.T + (mha.out_proj.bias if bias else 0)
    y = mha(query, key, value, is_causal=True)
    assert relative_error(y, expected) < 1e-12


def test_every_parameter_gets_a_gradient():
    mha = _multihead()
    x = torch.randn(2, 40, 24)
    (mha(x, x, x) * torch.randn(2, 40, 24)).sum().backward()
    # A key bias shifts all scores of a query alike, which softmax does not see.
    silent = {name for name, p in mha.named_parameters() if p.grad.abs().max() < 1e-5}
    assert silent == {"k_proj.bias"}


def test_initialisation_is_magnetos():
    torch.manual_seed(0)
    mha = _multihead(embed_dim=512, num_heads=8, gamma_init=3.0)
    for projection, gain in (
        (mha.q_proj, 1 / math.sqrt(2)),
        (mha.k_proj, 1 / math.sqrt(2)),
        (mha.v_proj, 3 / math.sqrt(2)),
        (mha.out_proj, 3.0),
    ):
        bound = gain * math.sqrt(6 / (512 + 512))
        assert projection.weight.abs().max() <= bound
        assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert not projection.bias.any()


def test_dropout_is_for_training():
    mha, x = _multihead(dropout=0.5), torch.randn(1, 40, 24)
    plain = _multihead()
    plain.load_state_dict(mha.state_dict())
    assert torch.equal(mha.eval()(x, x, x), plain(x, x, x))
    assert not torch.equal(mha.train()(x, x, x), mha(x, x, x))


def test_need_weights_returns_a_pair():
    mha, x = _multihead(), torch.randn(1, 10, 24)
    y = mha(x, x, x)
    assert isinstance(y, torch.Tensor)
    for need_weights in (False, True):
        pair = mha(x, x, x, need_weights=need_weights)
        assert pair[1] is None
        assert torch.equal(pair[0], y)


def test_masks_and_packing_reach_the_attention():
    mha = _multihead(dtype=torch.float64, num_kv_heads=2)
    x = torch.randn(60, 24, dtype=torch.float64)
    packed = mha(x, x, x, cu_seqlens=torch.tensor([0, 40, 60]))
    first, second = x[None, :40], x[None, 40:]
    alone = mha(first, first, first)[0], mha(second, second, second)[0]
    assert relative_error(packed, torch.cat(alone)) < 1e-13
    padded = torch.stack([x[:40], torch.cat([x[40:], torch.randn(20, 24, dtype=x.dtype)])])
    mask = torch.arange(40) >= torch.tensor([[40], [20]])
    y = mha(padded, padded, padded, key_padding_mask=mask)
    assert relative_error(torch.cat([y[0], y[1, :20]]), packed) < 1e-13


def test_workspace_limit_reaches_the_attention():
    mha, x = _multihead(max_workspace_bytes=1), torch.randn(1, 40, 24)
    assert "max_workspace_bytes=1" in repr(mha)
    with pytest.raises(ValueError, match="max_workspace_bytes is 1; these inputs need at least"):
        mha(x, x, x)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_float64_stays_float64_under_autocast(layer_norm):
    """As `nn.Linear` and `nn.MultiheadAttention` keep it."""
    mha = _multihead(dtype=torch.float64, layer_norm=layer_norm)
    x = torch.randn(2, 40, 24, dtype=torch.float64)
    expected = mha(x, x, x, is_causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = mha(x, x, x, is_causal=True)
    assert torch.equal(y, expected)
    for a, b in zip(
        torch.autograd.grad(y.sum(), mha.parameters()),
        torch.autograd.grad(expected.sum(), mha.parameters()),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_float32_is_autocast_as_pytorchs_attention_is(layer_norm):
    mha, x = _multihead(layer_norm=layer_norm), torch.randn(2, 40, 24)
    native = nn.MultiheadAttention(24, 4, batch_first=True)
    exact = copy.deepcopy(mha).double()(*(x.double(),) * 3)
    half = copy.deepcopy(mha).bfloat16()(*(x.bfloat16(),) * 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = mha(x, x, x)
        assert y.dtype == native(x, x, x, need_weights=False)[0].dtype == torch.bfloat16
    assert relative_error(y, exact) < 2 * relative_error(half, exact)
    (y * torch.randn_like(y)).sum().backward()
    assert {p.grad.dtype for p in mha.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", ["False", None, 1])
def test_is_causal_must_be_a_bool(value):
    mha, x = _multihead(), torch.randn(1, 40, 24)
    q = torch.randn(1, 40, 4, 6)
    for call in (
        lambda: mha(x, x, x, is_causal=value),
        lambda: mha(x, x, x, is_causal=value, attn_mask=torch.ones(40, 40) > 0),
        lambda: mha.attention(q, q, q, value),
        lambda: DynamicDilatedAttention()(q, q, q, value),
    ):
        with pytest.raises(TypeError, match=f"is_causal is {value!r}; it must be True or False"):
            call()


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize(
    "module", [DilatedAttention(LENGTHS, RATES), _multihead()], ids=lambda m: type(m).__name__
)
def test_copies_compute_the_same(module, again):
    copied = again(module)
    x = torch.randn(1, 20, 4, 6) if isinstance(module, DilatedAttention) else torch.randn(1, 20, 24)
    assert torch.equal(copied(x, x, x), module(x, x, x))
    assert torch.equal(copied(x, x, x), module(x, x, x))


def test_repr_shows_the_options():
    module = DilatedAttention([8, 16], [1, 2], padding="attended", scale=0.5)
    expected = "segment_lengths=[8, 16], dilation_rates=[1, 2], padding='attended', scale=0.5"
    assert repr(module) == f"DilatedAttention({expected})"
    assert "embed_dim=24, num_heads=4" in repr(_multihead())


def test_factory_keywords_device():
    mha = _multihead(device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in mha.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"embed_dim": 25}, ValueError, "embed_dim is 25 and num_heads 4; num_heads must divide"),
        ({"num_heads": 0}, ValueError, "num_heads is 0; it must be at least 1"),
        ({"embed_dim": 24.0}, TypeError, "embed_dim is 24.0; it must be an integer"),
        ({"gamma_init": -1.0}, ValueError, "gamma_init is -1.0; it must be above 0"),
        ({"layer_norm_eps": 0.0}, ValueError, "layer_norm_eps is 0.0; it must be above 0"),
        ({"dilation_rates": [1]}, ValueError, "segment_lengths has 2 entries and dilation_rates 1"),
        ({"scale": float("inf")}, ValueError, "scale is inf; it must be finite"),
        ({"dropout": 2}, ValueError, "^dropout is 2; it must be at least 0 and below 1"),
        (
            {"num_kv_heads": 3},
            ValueError,
            "num_heads is 4 and num_kv_heads 3; num_kv_heads must div",
        ),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; it must be at least 1"),
        ({"bias": "False"}, TypeError, "bias is 'False'; it must be True or False"),
        ({"bias": None}, TypeError, "bias is None; it must be True or False"),
        ({"layer_norm": 1}, TypeError, "layer_norm is 1; it must be True or False"),
        ({"dtype": torch.int64}, TypeError, "dtype is torch.int64; it must be a floating-point"),
        ({"backend": None}, TypeError, "backend is None; it must be 'auto' or the name of"),
    ],
)
def test_construction_mistakes(options, error, message):
    with pytest.raises(error, match=message):
        _multihead(**options)


def test_call_mistakes():
    mha, x = _multihead(), torch.randn(2, 10, 24)
    with pytest.raises(ValueError, match=r"query has shape \(2, 10, 8\); it must be \(batch, seq"):
        mha(x[..., :8], x, x)
    with pytest.raises(ValueError, match="they must be equal"):
        mha(x, x[:, :5], x[:, :5])
    with pytest.raises(ValueError, match="key_padding_mask holds values other than 0 and -inf"):
        mha(x, x, x, key_padding_mask=torch.ones(2, 10))
    with pytest.raises(
        ValueError, match=r"query has shape \(2, 10, 24\); it must be \(positions, 2"
    ):
        mha(x, x, x, cu_seqlens=torch.tensor([0, 10]))
    with pytest.raises(TypeError, match="need_weights is None; it must be True or False"):
        mha(x, x, x, need_weights=None)
    causal = torch.full((10, 10), float("-inf")).triu(1)
    assert torch.equal(mha(x, x, x, attn_mask=causal, is_causal=True), mha(x, x, x, is_causal=True))
    for mask, is_causal in (
        (causal, False),
        (causal.triu(2), True),
        (causal + 1, True),
        (torch.zeros(10, 10), True),
        (causal[:5], True),
    ):
        with pytest.raises(ValueError, match=r"attn_mask has shape .* pass attn_mask=None"):
            mha(x, x, x, attn_mask=mask, is_causal=is_causal)


@pytest.mark.parametrize("kind", ["auto", "standard", "improved"])
def test_factory_names_are_one_mathematics(kind):
    q, k, v = torch.randn(3, 1, 40, 4, 6).unbind()
    module = create_dilated_attention(kind, segment_lengths=LENGTHS, dilation_rates=RATES)
    assert torch.equal(module(q, k, v), dilated_attention(q, k, v, PATTERN))
    mha = create_multihead_dilated_attention(
        kind, embed_dim=24, num_heads=4, segment_lengths=LENGTHS, dilation_rates=RATES
    )
    x = torch.randn(1, 40, 24)
    assert mha(x, x, x, is_causal=True).shape == x.shape


def test_factory_takes_configs_and_lets_keywords_override():
    attention_config = DilatedAttentionConfig(segment_lengths=LENGTHS, dilation_rates=RATES)
    multihead_config = MultiheadConfig(embed_dim=24, num_heads=4, layer_norm=False)
    mha = create_multihead_dilated_attention(
        "improved",
        multihead_config=multihead_config,
        attention_config=attention_config,
        num_heads=2,
    )
    assert (mha.embed_dim, mha.num_heads, mha.layer_norm) == (24, 2, None)
    assert mha.attention.pattern == PATTERN
    assert multihead_config.num_heads == 4
    assert create_multihead_dilated_attention().embed_dim == 768
    assert create_dilated_attention().pattern.segment_lengths == (2048, 4096, 8192)


def test_factory_mistakes():
    with pytest.raises(ValueError, match=r"'ring' is not installed; it comes with .* dilated-ring"):
        create_multihead_dilated_attention("ring")
    if not entry_points(group="dilated.attention", name="block_sparse"):
        with pytest.raises(ValueError, match=r"'block_sparse' is not .* package dilated-sparse"):
            create_dilated_attention("block_sparse")
    with pytest.raises(
        ValueError, match=r"'best' is unknown; it must be one of 'auto', .*'improved'"
    ):
        create_dilated_attention("best")
    with pytest.raises(TypeError, match="kind is 3; it must be a name, such as 'auto'"):
        create_dilated_attention(3)
