"""Further models of transformers: one long segment is sdpa, and a DilatedCache is the whole."""

from typing import Any

import pytest
import torch
import transformers
from dilated_models.huggingface import DilatedCache, dilated_pattern
from dilated_models.huggingface.bounded_cache import CACHE_NAME

pytestmark = pytest.mark.exhaustive

ENCODERS = ["Albert", "DistilBert", "Electra", "Ernie", "Esm", "EuroBert", "NomicBert", "Roberta"]
DECODERS = [
    *("Apertus", "Arcee", "BioGpt", "Cohere", "Ernie4_5", "GPTBigCode", "Gemma", "Glm", "Glm4"),
    *("Granite", "Helium", "HunYuanDenseV1", "Nemotron", "OPT", "Olmo", "Olmo2", "Persimmon"),
    *("Phi", "Phi3", "Qwen2", "SmolLM3", "StableLm", "Starcoder2"),
]
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def build(name: str, kind: str, attention: str) -> Any:
    heads = {} if name in ENCODERS else {"num_key_value_heads": 2, "head_dim": 8}
    config = getattr(transformers, f"{name}Config")(**SIZES, **heads)
    torch.manual_seed(0)
    make = getattr(transformers, f"{name}{kind}")._from_config
    return make(config, attn_implementation=attention).double().eval()


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
@torch.no_grad()
def test_one_long_segment_is_sdpa_and_other_patterns_are_not(
    name: str, tokens: torch.Tensor
) -> None:
    kind = "Model" if name in ENCODERS else "ForCausalLM"
    mask = torch.ones_like(tokens)
    mask[1, :16] = 0
    model, sdpa = build(name, kind, "dilated"), build(name, kind, "sdpa")
    with dilated_pattern([1000], [1]):
        actual = model(tokens, attention_mask=mask)[0][mask.bool()]
    wanted = sdpa(tokens, attention_mask=mask)[0][mask.bool()]
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)
    with dilated_pattern([6, 20], [1, 3]):
        other = model(tokens, attention_mask=mask)[0][mask.bool()]
    assert (other - wanted).abs().max() > 1e-3


@pytest.mark.skipif(CACHE_NAME != "cache", reason="transformers is older than 5.24")
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_a_dilated_cache_is_the_whole(name: str, tokens: torch.Tensor, cached: Any) -> None:
    model = build(name, "ForCausalLM", "dilated")
    with dilated_pattern([6, 20], [1, 3]):
        cache = DilatedCache(model.config)
        parts = [cached(model, part, cache) for part in tokens.split([30, 1, 14], dim=1)]
        wanted = model(tokens, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-9, atol=1e-10)
