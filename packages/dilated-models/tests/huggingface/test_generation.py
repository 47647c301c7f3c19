"""`generate` with a cache gives the tokens of whole forwards, padded batches too."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from dilated_models.huggingface import DilatedCache
from dilated_models.huggingface.bounded_cache import CACHE_NAME
from transformers import DynamicCache


def caches(config: Any) -> Iterator[dict[str, Any]]:
    """Arguments of `generate` for each kind of cache."""
    yield {}
    yield {"cache_implementation": "static"}
    yield {"past_key_values": DynamicCache(config=config)}  # the name of 5.23, deprecated in 5.24
    if CACHE_NAME == "cache":
        yield {"cache": DilatedCache(config)}


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_generate_equals_whole_forwards_in_a_left_padded_batch(
    decoder: Any, tokens: torch.Tensor, padded: Any, greedy: Any
) -> None:
    ids, mask = padded(tokens, [23, 9], "left")
    wanted = [greedy(decoder, tokens[b, :n], 25).tolist() for b, n in enumerate([23, 9])]
    for cache in caches(decoder.config):
        options = {"max_new_tokens": 25, "do_sample": False, **cache}
        assert decoder.generate(ids, attention_mask=mask, **options)[:, 23:].tolist() == wanted


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_beams_reorder_the_cache(llama: Any, tokens: torch.Tensor) -> None:
    arguments = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    wanted = llama.generate(tokens[:, :20], **arguments, use_cache=False)
    for cache in caches(llama.config):
        assert torch.equal(llama.generate(tokens[:, :20], **arguments, **cache), wanted)
