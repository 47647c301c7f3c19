"""The decoder layer: the definition, PyTorch's stack around it, masks, packed sequences."""

from types import SimpleNamespace

import pytest
import torch
from dilated_models import DilatedTransformerDecoderLayer, DilatedTransformerEncoderLayer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

OPTIONS = {"dim_feedforward": 48, "segment_lengths": [6, 16, 40], "dilation_rates": [1, 3, 4]}
NAMES = {
    "self_attn_layer_norm": "attention_norm",
    "self_attn": "attention",
    "encoder_attn_layer_norm": "cross_attention_norm",
    "encoder_attn": "cross_attention",
    "final_layer_norm": "feed_forward_norm",
    "ffn": "feed_forward",
}


def made(**options) -> DilatedTransformerDecoderLayer:
    torch.manual_seed(0)
    layer = DilatedTransformerDecoderLayer(32, 4, **OPTIONS, **options, dtype=torch.float64)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return layer


def drawn(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 32, generator=generator, dtype=torch.float64)


@given(
    M=st.integers(1, 50),
    N=st.integers(1, 50),
    is_causal=st.booleans(),
    memory_is_causal=st.booleans(),
    num_kv_heads=st.sampled_from([None, 1, 2]),
    backend=st.sampled_from(["auto", "eager"]),
)
@example(M=1, N=37, is_causal=True, memory_is_causal=False, num_kv_heads=2, backend="auto")
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_equals_the_definition(
    naive_class, M, N, is_causal, memory_is_causal, num_kv_heads, backend
):
    layer = made(num_kv_heads=num_kv_heads, activation="relu", backend=backend)
    N = M if memory_is_causal else N
    tgt, memory = drawn(2, M).requires_grad_(), drawn(2, N, seed=2).requires_grad_()
    out = layer(tgt, memory, tgt_is_causal=is_causal, memory_is_causal=memory_is_causal)
    weights = {}
    for name, parameter in layer.named_parameters():
        part, rest = name.split(".", 1)
        weights[f"layer.{NAMES[part]}.{rest}"] = parameter
    config = SimpleNamespace(**vars(layer.config), head_dim=8, positions="none")
    expected = naive_class(config, weights).block("layer", tgt, is_causal, memory, memory_is_causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    upstream = drawn(2, M, seed=3).flip(-1)
    inputs = (tgt, memory, *layer.parameters())
    found, wanted = (torch.autograd.grad(y, inputs, upstream) for y in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_works_inside_pytorchs_decoder(batch_first, training):
    layer = made(batch_first=batch_first)
    stack = nn.TransformerDecoder(layer, 2, norm=nn.LayerNorm(32).double()).train(training)
    tgt, memory = drawn(3, 45), drawn(3, 20, seed=2)
    mask = nn.Transformer.generate_square_subsequent_mask(45, dtype=torch.float64)
    padding = torch.zeros(3, 20, dtype=torch.bool)
    padding[0, 15:] = padding[1, :4] = True

    def run(tgt: torch.Tensor, memory: torch.Tensor, **masks) -> torch.Tensor:
        inputs = (tgt, memory) if batch_first else (tgt.transpose(0, 1), memory.transpose(0, 1))
        out = stack(*inputs, memory_key_padding_mask=padding, **masks)
        return out if batch_first else out.transpose(0, 1)

    with torch.set_grad_enabled(training):
        got = run(tgt, memory, tgt_mask=mask)
        expected = tgt
        for part in stack.layers:
            alone = [
                part(*(x[i : i + 1, rows] if batch_first else x[i : i + 1, rows].transpose(0, 1)
                       for x, rows in ((expected, slice(None)), (memory, ~padding[i]))),
                     tgt_is_causal=True)
                for i in range(3)
            ]  # fmt: skip
            expected = torch.cat([x if batch_first else x.transpose(0, 1) for x in alone])
        torch.testing.assert_close(got, stack.norm(expected), rtol=0, atol=1e-11)
        assert torch.equal(got, run(tgt, memory, tgt_is_causal=True))  # the mask is not needed
    later = torch.cat((tgt[:, :30], tgt[:, 30:] + 1), 1)
    hidden = memory.masked_fill(padding[..., None], torch.nan)
    assert torch.equal(run(later, hidden, tgt_is_causal=True)[:, :30], got[:, :30])
    assert not torch.equal(run(later, memory)[:, :30], got[:, :30])  # not causal unless told so


def test_layers_work_inside_pytorchs_transformer():
    options = {"dtype": torch.float64, "batch_first": False}
    torch.manual_seed(0)
    encoder = DilatedTransformerEncoderLayer(32, 4, **OPTIONS, **options)
    net = nn.Transformer(
        32,
        4,
        custom_encoder=nn.TransformerEncoder(encoder, 1, enable_nested_tensor=False),
        custom_decoder=nn.TransformerDecoder(made(batch_first=False), 1),
    ).double()
    src, tgt = drawn(20, 2), drawn(30, 2, seed=2)  # PyTorch's default: the batch is second
    mask = net.generate_square_subsequent_mask(30, dtype=torch.float64)
    padding = torch.zeros(2, 20, dtype=torch.bool)
    padding[1, 15:] = True
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    got = net(src, tgt, tgt_mask=mask, tgt_is_causal=True, **masks)
    memory = net.encoder.layers[0](src, src_key_padding_mask=padding)
    expected = net.decoder.layers[0](
        tgt, memory, memory_key_padding_mask=padding, tgt_is_causal=True
    )
    assert torch.equal(got, expected)


def test_a_memory_without_rows_adds_the_bias_alone():
    layer, memory = made(), drawn(2, 9).requires_grad_()
    padding = torch.tensor([[False] * 9, [True] * 9])
    out = layer(drawn(2, 20), memory, memory_key_padding_mask=padding.double() * -1e300 * 1e300)
    out.sum().backward()
    assert out.isfinite().all()
    assert memory.grad.isfinite().all()
    assert memory.grad[1].eq(0).all()
    other = layer(drawn(2, 20), memory + 5, memory_key_padding_mask=padding)
    assert torch.equal(other[1], out[1])


def test_padding_of_the_decoder_is_hidden():
    layer, tgt, memory = made(), drawn(2, 30), drawn(2, 9, seed=2)
    padding = torch.zeros(2, 30, dtype=torch.bool)
    padding[:, 25:] = True
    out = layer(tgt, memory, tgt_key_padding_mask=padding)
    changed = torch.cat((tgt[:, :25], tgt[:, 25:] * 3), 1)
    assert torch.equal(layer(changed, memory, tgt_key_padding_mask=padding)[:, :25], out[:, :25])


@pytest.mark.parametrize("memory_is_causal", [False, True])
def test_packed_sequences_are_as_alone(memory_is_causal):
    layer = made(num_kv_heads=2)
    lengths, rows = (20, 1, 0, 17), (20, 1, 0, 17) if memory_is_causal else (3, 40, 5, 1)
    tgt, memory = drawn(38), drawn(sum(rows), seed=2)
    bounds = [torch.tensor([0, *x]).cumsum(0) for x in (lengths, rows)]
    causal = {"tgt_is_causal": True, "memory_is_causal": memory_is_causal}
    packed = layer(tgt, memory, **causal, cu_seqlens=bounds[0], memory_cu_seqlens=bounds[1])
    alone = [
        layer(x[None], y[None], **causal)[0]
        for x, y in zip(tgt.split(lengths), memory.split(rows), strict=True)
        if len(x)
    ]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=1e-11)


def test_dropout_of_attention_acts_in_training_only():
    layer, tgt, memory = made(attention_dropout=0.5), drawn(1, 20), drawn(1, 9, seed=2)
    layer.self_attn.attention.eval()  # only that of the memory is left
    assert not torch.equal(layer(tgt, memory), layer(tgt, memory))
    layer.eval()
    assert torch.equal(layer(tgt, memory), layer(tgt, memory))


def test_paths_are_dropped_in_training_only():
    layer, tgt, memory = made(drop_path=0.999999), drawn(2, 20), drawn(2, 9, seed=2)
    assert torch.equal(layer(tgt, memory), tgt)  # all three parts
    assert not torch.equal(layer.eval()(tgt, memory), tgt)


def test_bad_arguments_are_refused():
    layer, tgt, memory = made(), drawn(2, 20), drawn(2, 9, seed=2)
    with pytest.raises(ValueError, match="attention to the memory is dense or causal"):
        layer(tgt, memory, memory_mask=torch.zeros(20, 9))
    with pytest.raises(ValueError, match="the pattern decides"):
        layer(tgt, memory, tgt_mask=torch.zeros(20, 20))
    with pytest.raises(ValueError, match="causal attention needs as many rows of the memory"):
        layer(tgt, memory, memory_is_causal=True)
    with pytest.raises(ValueError, match=r"memory has shape \(3, 9, 32\) and tgt \(2, 20, 32\)"):
        layer(tgt, drawn(3, 9))
    with pytest.raises(ValueError, match="one is given; both sequences must be packed"):
        layer(tgt[0], memory[0], cu_seqlens=torch.tensor([0, 20]))
    with pytest.raises(ValueError, match="they must have equally many, one memory for each"):
        layer(tgt[0], memory[0], cu_seqlens=torch.tensor([0, 20]),
              memory_cu_seqlens=torch.tensor([0, 4, 9]))  # fmt: skip
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(2, 20\)"):
        layer(tgt, memory, memory_key_padding_mask=torch.zeros(2, 20, dtype=torch.bool))
    with pytest.raises(TypeError, match="no argument 'mask'"):
        layer(tgt, memory, mask=None)
    with pytest.raises(TypeError, match="batch_first is 1; it must be True or False"):
        made(batch_first=1)
