"""The encoder: the definition forward and backward, packed sequences, recomputation."""

import copy

import pytest
import torch
from dilated_core import MultiheadDilatedAttention, reference_dilated_attention
from dilated_models.encoder.stack import LongNetEncoder
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = {
    "d_model": 16,
    "nhead": 4,
    "num_layers": 2,
    "dim_feedforward": 24,
    "segment_lengths": [6, 16, 40],
    "dilation_rates": [1, 3, 4],
}
PUBLISHED = {"head_offsets": "blocked", "padding": "attended"}


def with_reference_attention(encoder: LongNetEncoder) -> LongNetEncoder:
    """The same encoder, its attention evaluated from the definition."""
    encoder = copy.deepcopy(encoder)
    pattern = encoder.config.pattern
    replaced = 0

    def attend(q, k, v, *, is_causal=False, key_padding_mask=None, cu_seqlens=None):
        return reference_dilated_attention(
            q,
            k,
            v,
            pattern,
            is_causal=is_causal,
            key_padding_mask=key_padding_mask,
            cu_seqlens=cu_seqlens,
        )

    for module in encoder.modules():
        if isinstance(module, MultiheadDilatedAttention):
            module.attend = attend
            replaced += 1
    assert replaced == encoder.num_layers
    return encoder


@settings(max_examples=12, deadline=None)
@given(
    seq_len=st.sampled_from([1, 2, 5, 17, 41, 83]),
    change=st.sampled_from([{}, PUBLISHED, {"activation": "relu", "final_layer_norm": False}]),
    is_causal=st.booleans(),
    padded=st.booleans(),
)
def test_equals_the_definition_forward_and_backward(seq_len, change, is_causal, padded):
    torch.manual_seed(seq_len)
    encoder = LongNetEncoder(**OPTIONS, **change, dtype=torch.float64)
    oracle = with_reference_attention(encoder)
    x = torch.randn(2, seq_len, 16, dtype=torch.float64)
    mask = torch.rand(2, seq_len) < 0.3 if padded else None
    upstream = torch.randn(seq_len, 2, 16, dtype=torch.float64).transpose(0, 1)
    results = []
    for model in (encoder, oracle):
        y = model(x, mask, is_causal=is_causal)
        gradients = torch.autograd.grad(y, list(model.parameters()), upstream)
        results.append((y, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("change", [{}, PUBLISHED])
def test_packed_sequences_are_as_if_alone(change):
    torch.manual_seed(1)
    encoder = LongNetEncoder(**OPTIONS, **change, dtype=torch.float64)
    parts = [torch.randn(1, n, 16, dtype=torch.float64) for n in (30, 1, 17, 50)]
    starts = torch.tensor([0, 30, 31, 48, 98])
    got = encoder(torch.cat(parts, 1)[0], cu_seqlens=starts)
    expected = torch.cat([encoder(part)[0] for part in parts])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_states_are_those_before_the_final_norm():
    torch.manual_seed(1)
    encoder = LongNetEncoder(**OPTIONS)
    x, states = torch.randn(2, 30, 16), []
    y = encoder(x, on_state=states.append)
    assert torch.equal(states[0], x)
    assert len(states) == 3
    assert torch.equal(encoder.layers[1](states[1]), states[2])
    assert torch.equal(encoder.layer_norm(states[2]), y)


def test_recomputation_changes_no_gradient():
    torch.manual_seed(1)
    options = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path_rate": 0.3}
    encoder = LongNetEncoder(**OPTIONS, **options)
    recomputing = LongNetEncoder(**OPTIONS, **options, activation_checkpointing=True)
    recomputing.load_state_dict(encoder.state_dict())
    x = torch.randn(3, 30, 16)
    results = []
    for model in (encoder, recomputing):
        torch.manual_seed(5)
        results.append(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))
    torch.testing.assert_close(results[0], results[1])


def test_bad_inputs_are_refused():
    encoder = LongNetEncoder(**OPTIONS)
    with pytest.raises(ValueError, match=r"must be \(batch, sequence, 16\)"):
        encoder(torch.randn(30, 16))
    with pytest.raises(ValueError, match=r"must be \(positions, 16\)"):
        encoder(torch.randn(1, 30, 16), cu_seqlens=torch.tensor([0, 30]))
    with pytest.raises(TypeError, match="has no argument 'mask'"):
        encoder(torch.randn(1, 30, 16), mask=None)
    with pytest.raises(TypeError, match="follows from num_layers"):
        LongNetEncoder(**OPTIONS, gamma_init=2.0)


def turned(x, positions, scale_base, sign):
    """Pairs of channels as complex numbers, turned and scaled as in xPos (arXiv 2212.10554)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    share = torch.arange(pairs.shape[-1], dtype=torch.float64) / pairs.shape[-1]
    angle = positions[:, None] * 10_000**-share
    factor = torch.polar(torch.ones_like(angle), angle)
    if scale_base:
        zeta = (share + 0.4) / 1.4
        factor = factor * zeta ** (sign * positions[:, None] / scale_base)
    return torch.view_as_real(pairs * factor[:, None]).flatten(-2)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_queries_and_keys_are_turned_by_their_positions(positions, is_causal):
    torch.manual_seed(3)
    options = OPTIONS | {"num_kv_heads": 2, "positions": positions, "xpos_scale_base": 16}
    encoder = LongNetEncoder(**options, dtype=torch.float64)
    x = torch.randn(1, 37, 16, dtype=torch.float64)
    layer = encoder.layers[0]
    normed = layer.self_attn_layer_norm(x)
    q, k, v = layer.self_attn.project(normed, normed, normed)
    assert k.shape == (1, 37, 2, 4)
    base, rows = 16 if positions == "xpos" else None, torch.arange(37, dtype=torch.float64)
    q, k = turned(q, rows, base, 1), turned(k, rows, base, -1)
    out = reference_dilated_attention(q, k, v, encoder.config.pattern, is_causal=is_causal)
    expected = x + layer.self_attn.combine(out)
    expected = expected + layer.ffn(layer.final_layer_norm(expected))
    states = []
    encoder(x, is_causal=is_causal, on_state=states.append)
    torch.testing.assert_close(states[1], expected, rtol=0, atol=1e-10)
    mask = torch.zeros(1, 37, dtype=torch.bool)
    mask[:, 30:] = True
    padded = encoder(x, mask, is_causal=is_causal)
    changed = torch.cat((x[:, :30], torch.randn(1, 7, 16, dtype=torch.float64)), 1)
    assert torch.equal(encoder(changed, mask, is_causal=is_causal)[:, :30], padded[:, :30])


@pytest.mark.parametrize("positions", ["rotary", "xpos"])
def test_positions_count_in_each_packed_sequence(positions):
    torch.manual_seed(3)
    encoder = LongNetEncoder(**OPTIONS, positions=positions, dtype=torch.float64)
    parts = [torch.randn(1, n, 16, dtype=torch.float64) for n in (30, 1, 17)]
    got = encoder(torch.cat(parts, 1)[0], cu_seqlens=torch.tensor([0, 30, 31, 48]))
    expected = torch.cat([encoder(part)[0] for part in parts])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_positions_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="head_dim, d_model / nhead, is 3"):
        LongNetEncoder(**OPTIONS | {"d_model": 12}, positions="rotary")
    with pytest.raises(ValueError, match="num_kv_heads must divide"):
        LongNetEncoder(**OPTIONS, num_kv_heads=3)
    encoder = LongNetEncoder(**OPTIONS, positions="xpos", xpos_scale_base=1.0)
    with pytest.raises(ValueError, match="positions from the center"):
        encoder(torch.randn(1, 2000, 16))
