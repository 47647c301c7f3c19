"""Tiny random models of four kinds, in float64; nothing is downloaded."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from dilated_core import DilatedPattern, reference_dilated_attention
from dilated_models.huggingface import register_with_transformers
from dilated_models.huggingface.bounded_cache import CACHE_NAME

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
PATTERN = DilatedPattern([5, 12, 40], [1, 2, 3])


@pytest.fixture(scope="session", autouse=True)
def _registered() -> None:
    register_with_transformers()
    transformers.AttentionInterface.register("oracle", oracle)


def oracle(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """The definition, over whole sequences without padding."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    config: Any = module.config
    offsets = getattr(config, "head_offsets", "interleaved")
    pattern = DilatedPattern(config.segment_lengths, config.dilation_rates, head_offsets=offsets)
    causal = bool(module.is_causal)
    out = reference_dilated_attention(q, k, v, pattern, is_causal=causal, scale=scaling)
    return out.to(query.dtype), None


def _decoders() -> dict[str, Callable[[], Any]]:
    t = transformers
    return {
        "llama": lambda: (t.LlamaForCausalLM, t.LlamaConfig(**LLAMA)),
        "qwen3": lambda: (t.Qwen3ForCausalLM, t.Qwen3Config(**LLAMA, head_dim=8)),
        "gpt2": lambda: (
            t.GPT2LMHeadModel,
            t.GPT2Config(**SMALL, n_positions=256, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        ),
    }


def _bert() -> Any:
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(**SMALL, intermediate_size=48, **off)
    return transformers.BertForMaskedLM, config


def build(kind: str, pattern: DilatedPattern = PATTERN, attention: str = "dilated") -> Any:
    """A model with the same weights for each pattern and attention."""
    make, config = (_bert if kind == "bert" else _decoders()[kind])()
    config.segment_lengths = list(pattern.segment_lengths)
    config.dilation_rates = list(pattern.dilation_rates)
    config.head_offsets = pattern.head_offsets
    config.bos_token_id = config.eos_token_id = None
    config.pad_token_id = 0
    torch.manual_seed(0)
    return make._from_config(config, attn_implementation=attention).double().eval()


def _cached(model: Any, tokens: torch.Tensor, cache: Any, **arguments: Any) -> Any:
    """Logits of a call with a cache, by the name that this version of transformers has."""
    return model(tokens, **{CACHE_NAME: cache}, use_cache=True, **arguments).logits


def _padded(tokens: torch.Tensor, lengths: list[int], side: str) -> tuple[torch.Tensor, Any]:
    """Tokens and mask of rows with the first `lengths[b]` tokens of each."""
    S = max(lengths)
    ids = torch.zeros(len(lengths), S, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, n in enumerate(lengths):
        at = slice(0, n) if side == "right" else slice(S - n, S)
        ids[b, at], mask[b, at] = tokens[b, :n], 1
    return ids, mask


def _greedy(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens by whole forwards, without a cache."""
    tokens = prompt[None]
    with torch.no_grad():
        for _ in range(count):
            logits = model(tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :]


@pytest.fixture
def cached() -> Callable[..., Any]:
    return _cached


@pytest.fixture
def padded() -> Callable[..., Any]:
    return _padded


@pytest.fixture
def greedy() -> Callable[..., Any]:
    return _greedy


@pytest.fixture
def build_model() -> Callable[..., Any]:
    return build


@pytest.fixture(params=["llama", "qwen3", "gpt2"])
def decoder(request: pytest.FixtureRequest) -> Iterator[Any]:
    return build(request.param)


@pytest.fixture
def llama() -> Any:
    return build("llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(1, 61, (2, 45), generator=torch.Generator().manual_seed(1))
