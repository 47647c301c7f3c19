"""Continue a text, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from dilated_models.longnet.language_model import LongNetLM


def generate(
    model: LongNetLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Sample a continuation.

    Every token is drawn from a full forward over all tokens before it, so each distribution is
    exactly the model's. Draws happen on the CPU: a seed gives the same text on every device whose
    logits are the same.

    Args:
        model: The model; put in evaluation mode for the time.
        prompt: Token ids, at least one.
        max_new_tokens: Number of tokens to yield, at least 1.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw among this many most likely tokens; None means among all.
        seed: Of the draws.

    Yields:
        One token id after the other.

    Raises:
        ValueError: If the prompt is empty or holds an unknown token, or a number is out of range.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=1,
        ...                   dim_feedforward=64, segment_lengths=[8], dilation_rates=[1])
        >>> len(list(generate(model, b"def ", max_new_tokens=5)))
        5
    """
    num_tokens = model.config.num_tokens
    if not prompt:
        raise ValueError("the prompt is empty; give at least one token to continue from.")
    if wrong := [token for token in prompt if not 0 <= token < num_tokens]:
        raise ValueError(f"token {wrong[0]} is not in the model's vocabulary of {num_tokens}.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 or more and finite, got {temperature}.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; leave it out to draw among all.")
    return _sample(model, list(prompt), max_new_tokens, temperature, top_k, seed)


def _sample(
    model: LongNetLM,
    tokens: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> Iterator[int]:
    generator = torch.Generator().manual_seed(seed)
    device = model.embedding.weight.device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            with torch.no_grad():
                logits = model(torch.tensor([tokens], device=device))[0, -1].double().cpu()
            if temperature == 0:
                token = int(logits.argmax())
            else:
                if top_k is not None and top_k < len(logits):
                    best = logits.topk(top_k)
                    logits = torch.full_like(logits, -torch.inf)
                    logits[best.indices] = best.values
                # Subtracting the largest first keeps a very low temperature from overflowing.
                probabilities = ((logits - logits.max()) / temperature).softmax(-1)
                token = int(torch.multinomial(probabilities, 1, generator=generator))
            tokens.append(token)
            yield token
    finally:
        model.train(was_training)
