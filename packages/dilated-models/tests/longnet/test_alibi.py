"""A LongNetLM with ALiBi: the biased softmax of the definition, in calls, documents and a cache."""

import dataclasses

import pytest
import torch
from dilated_models import EncoderDecoderConfig, GenerationCache, LongNetConfig, LongNetLM
from dilated_models.longnet import generation_cache


def made(config: LongNetConfig, **changes: object) -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(dataclasses.replace(config, positions="alibi", **changes), dtype=torch.float64)


def text(*shape: int) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes", [{"num_kv_heads": 2}, {"d_model": 20, "num_encoder_layers": 1}], ids=str
)
def test_equals_the_definition_forward_and_backward(config, naive, changes):
    """A head_dim of 5 too: nothing is turned in pairs."""
    model, tokens = made(config, **changes), text(2, 43)
    definition, memory = naive(model), None
    if model.config.num_encoder_layers:
        memory = definition.encode(tokens, True)
    logits, expected = model(tokens), definition.decode(tokens, memory, True, True)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    upstream = torch.randn(61, 43, 2, dtype=torch.float64).transpose(0, 2)
    parameters = list(model.parameters())
    found, wanted = (torch.autograd.grad(y, parameters, upstream) for y in (logits, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_positions_count_in_each_document_and_only_their_differences_matter(config):
    model, tokens = made(config), text(48)
    packed = model(tokens, cu_seqlens=torch.tensor([0, 30, 31, 48]))
    alone = torch.cat([model(part[None])[0] for part in tokens.split([30, 1, 17])])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-11)
    shifted = model(tokens[None], positions=torch.arange(48) + 5000)
    torch.testing.assert_close(shifted, model(tokens[None]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cache_in_single_and_half_precision(config, dtype):
    """The digits differ with the dtype: the cache has the channels of its own."""
    model, tokens = made(config), text(2, 90)
    exact = model(tokens)
    single = model.float().eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        cache = GenerationCache(single, 2)
        assert cache.blocks[0].attention.keys.dtype == dtype
        single(tokens[:, :80], cache=cache)
        found = torch.cat([single(tokens[:, [t]], cache=cache) for t in range(80, 90)], 1)
        whole = single(tokens)[:, 80:]
    bound = 5e-5 if dtype == torch.float32 else 0.15
    assert (found.double() - exact[:, 80:]).abs().max() < bound
    assert (whole.double() - exact[:, 80:]).abs().max() < bound


def test_what_cannot_be_honoured_is_refused(config, monkeypatch):
    model = made(config)
    with pytest.raises(ValueError, match="is_causal is False; ALiBi's bias"):
        model(text(1, 9), is_causal=False)
    with pytest.raises(ValueError, match="ALiBi needs dilated attention without a window"):
        LongNetConfig(
            num_tokens=9, positions="alibi", attention_kind="block_sparse",
            attention_options={"block_size": 4},
        )  # fmt: skip
    with pytest.raises(ValueError, match="an encoder sees later positions too"):
        EncoderDecoderConfig(positions="alibi")
    monkeypatch.setattr(generation_cache, "ALIBI_POSITIONS", 20)
    cache = GenerationCache(model)
    model(text(1, 20), cache=cache)
    with pytest.raises(ValueError, match="a text would have 21 tokens; ALiBi has positions for 20"):
        model(text(1, 1), cache=cache)
