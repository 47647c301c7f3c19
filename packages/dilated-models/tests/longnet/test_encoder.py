"""A LongNetLM with an encoder: one sequence feeds both stacks, and no future leaks."""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from dilated_models import (
    GenerationCache,
    LongNet,
    LongNetConfig,
    LongNetLM,
    generate,
    generate_batch,
)
from dilated_models.longnet import generation_cache
from dilated_models.longnet.saving import load_model, save_model, write_config


def made(config: LongNetConfig, **changes: object) -> LongNetLM:
    torch.manual_seed(0)
    config = dataclasses.replace(config, num_encoder_layers=2, **changes)
    model = LongNetLM(config, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # drawn as zeros
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def text(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("is_causal", "changes"),
    [
        (True, {"num_kv_heads": 2, "activation": "gelu", "tie_embeddings": True}),
        (False, {"positions": "rotary", "backend": "eager", "padding": "attended"}),
        (True, {"positions": "none", "final_layer_norm": False, "activation_checkpointing": True}),
    ],
    ids=str,
)
def test_equals_the_definition_forward_and_backward(config, naive, changes, is_causal):
    model, tokens = made(config, **changes), text(2, 43)
    logits = model(tokens, is_causal)
    definition = naive(model)
    expected = definition.decode(
        tokens, definition.encode(tokens, is_causal), is_causal, memory_is_causal=is_causal
    )
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    parameters = dict(model.named_parameters())
    upstream = torch.randn(61, 43, 2, dtype=torch.float64).transpose(0, 2)  # not contiguous
    gradients = [
        torch.autograd.grad(out, list(parameters.values()), upstream) for out in (logits, expected)
    ]
    for name, mine, theirs in zip(parameters, *gradients, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=0, atol=1e-9, msg=lambda message, n=name: f"{n}: {message}"
        )


def test_nothing_leaks_from_the_future_at_any_position(config):
    model, tokens = made(config), text(1, 33)
    with torch.no_grad():
        logits = model(tokens)
        for t in range(33):
            changed = tokens.clone()
            changed[0, t] = (tokens[0, t] + 1) % 61
            difference = (model(changed) - logits).abs()[0].amax(-1)
            assert difference[:t].max() < 1e-12 if t else True
            assert difference[t] > 1e-3


def test_later_positions_see_the_encoder_beyond_every_segment(config):
    """Dense cross-attention: the first token reaches a row that no branch shows it to."""
    model, tokens = made(config, segment_lengths=(4,), dilation_rates=(1,)), text(1, 40)
    changed = tokens.clone()
    changed[0, 0] = (tokens[0, 0] + 1) % 61
    assert (model(changed) - model(tokens)).abs()[0, -1].max() > 1e-6


def test_documents_are_as_alone(config):
    model, tokens = made(config, key_conv=3), text(60)
    bounds = [0, 20, 20, 21, 50, 60]
    packed = model(tokens, cu_seqlens=torch.tensor(bounds))
    for a, b in pairwise(bounds):
        if b > a:
            alone = model(tokens[None, a:b])[0]
            torch.testing.assert_close(packed[a:b], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"positions": "rotary", "key_conv": 4, "backend": "eager"},
        {"num_kv_heads": 2, "xpos_scale_base": 0.2},  # the center of xPos moves
    ],
    ids=str,
)
def test_a_cache_continues_as_the_whole_text(config, changes, monkeypatch):
    monkeypatch.setattr(generation_cache, "_TOKENS_PER_PART", 30)
    model, tokens = made(config, **changes).eval(), text(3, 125)
    with torch.no_grad():
        whole = model(tokens)
    cache = GenerationCache(model, 3)
    lengths = [5, 106, 105]
    last = model(tokens[:, :106], cache=cache, lengths=lengths)
    for step in range(12):
        expected = torch.stack([whole[b, length + step - 1] for b, length in enumerate(lengths)])
        torch.testing.assert_close(last[:, 0], expected, rtol=0, atol=1e-10)
        now = torch.stack([tokens[b, length + step] for b, length in enumerate(lengths)])
        last = model(now[:, None], cache=cache)
    assert cache.positions == (17, 118, 117)
    other = copy.copy(cache)
    cache.reorder([2, 0])
    both = model(torch.stack([tokens[2, 117:120], tokens[0, 17:20]]), cache=cache)
    expected = torch.stack([whole[2, 119], whole[0, 19]])
    torch.testing.assert_close(both[:, 0], expected, rtol=0, atol=1e-10)
    assert other.positions == (17, 118, 117)
    cache.reset()
    again = model(tokens[[2, 0], :40], cache=cache)
    torch.testing.assert_close(again[:, 0], whole[[2, 0], 39], rtol=0, atol=1e-10)


def test_generation_is_the_argmax_of_full_forwards(config):
    model = made(config)
    prompts = [[3, 1, 4], list(range(20))]
    found = list(zip(*generate_batch(model, prompts, max_new_tokens=8, temperature=0), strict=True))
    for prompt, tokens in zip(prompts, found, strict=True):
        assert list(generate(model, prompt, max_new_tokens=8, temperature=0)) == list(tokens)
        for i, token in enumerate(tokens):
            so_far = torch.tensor([[*prompt, *tokens[:i]]])
            assert model(so_far)[0, -1].argmax() == token


@pytest.mark.parametrize(
    ("kind", "N", "M"), [(LongNetLM, 1, 1), (LongNetLM, 12, 12), (LongNet, 2, 5)]
)
def test_gains_are_those_of_magneto(kind, N, M):
    """Table 2 of arXiv 2210.06423; torchscale leaves cross-attention at the gain of a plain one."""
    torch.manual_seed(0)
    model = kind(
        num_tokens=50, d_model=64, nhead=4, num_encoder_layers=N, num_decoder_layers=M,
        dim_feedforward=256, segment_lengths=[8], dilation_rates=[1],
    )  # fmt: skip
    encoder = math.sqrt(math.log(3 * M) * math.log(2 * N) / 3)
    decoder, half = math.sqrt(math.log(3 * M)), math.sqrt(0.5)
    seen = dict.fromkeys(("encoder_blocks", "blocks", "cross_attention"), 0)
    for name, weight in model.named_parameters():
        if weight.dim() != 2 or name in ("embedding.weight", "output.weight"):
            continue
        stack, _, part, matrix, _ = name.split(".")
        gain = {"encoder_blocks": encoder, "blocks": decoder}[stack]
        seen[stack] += 1
        if part == "cross_attention":
            gain, seen[part] = 1.0, seen[part] + 1
        gain *= {"q_proj": half / gain, "k_proj": half / gain, "v_proj": half}.get(matrix, 1)
        bound = gain * math.sqrt(6 / sum(weight.shape))
        assert 0.97 * bound < weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.04), name
    assert seen == {"encoder_blocks": 6 * N, "blocks": 10 * M, "cross_attention": 4 * M}
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(math.nan)
    model.reset_parameters()
    for name, weight in model.named_parameters():
        assert weight.isfinite().all(), name
        assert weight.std().nan_to_num().item() == pytest.approx(
            before[name].std().nan_to_num().item(), rel=0.06, abs=1e-6
        ), name


def test_the_signature_of_the_design_constructs_and_runs():
    options = {
        "num_tokens": 10000, "d_model": 768, "nhead": 12, "num_encoder_layers": 12,
        "num_decoder_layers": 12, "dim_feedforward": 3072, "segment_lengths": [2048, 4096],
        "dilation_rates": [1, 2], "dropout": 0.0, "activation": "relu", "layer_norm_eps": 1e-5,
    }  # fmt: skip
    model = LongNetLM(**options, device="meta")
    logits = model(torch.zeros(1, 8192, dtype=torch.int64, device="meta"))
    assert logits.shape == (1, 8192, 10000)
    # Two stacks of 12·d² each and 4·d² of cross-attention.
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert weights == 12 * (24 + 4) * 768**2 + 2 * 10000 * 768


def test_saved_and_loaded(config, tmp_path):
    model = made(config, num_kv_heads=1, tie_embeddings=True).float().eval()
    assert LongNetConfig.from_json(model.config.to_json()) == model.config
    write_config(tmp_path, {"model": model.config.to_dict(), "tokenizer": "bytes"})
    save_model(tmp_path, model)
    assert torch.equal(load_model(tmp_path)(text(1, 20)), model(text(1, 20)))
