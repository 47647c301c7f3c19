"""`generate` with a cache gives the tokens of whole forwards, padded batches too."""

from typing import Any

import pytest
import torch


def greedy(model: Any, prompt: torch.Tensor, count: int) -> torch.Tensor:
    """Tokens by whole forwards, without a cache."""
    tokens = prompt[None]
    with torch.no_grad():
        for _ in range(count):
            logits = model(tokens, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :]


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_equals_whole_forwards_in_a_left_padded_batch(
    decoder: Any, tokens: torch.Tensor, cache: str | None
) -> None:
    prompts = [tokens[0, :23], tokens[1, :9]]
    ids = torch.zeros(2, 23, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        ids[b, 23 - len(prompt) :], mask[b, 23 - len(prompt) :] = prompt, 1
    out = decoder.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=25,
        do_sample=False,
        **({} if cache is None else {"cache_implementation": cache}),
    )
    for b, prompt in enumerate(prompts):
        assert out[b, 23:].tolist() == greedy(decoder, prompt, 25).tolist()


def test_beams_reorder_the_cache(llama: Any, tokens: torch.Tensor) -> None:
    arguments = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    with_cache = llama.generate(tokens[:, :20], **arguments)
    assert torch.equal(with_cache, llama.generate(tokens[:, :20], **arguments, use_cache=False))
