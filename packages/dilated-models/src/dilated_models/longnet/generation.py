"""Continue a text, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from dilated_core.checks import check_integer, check_number

from dilated_models.longnet.language_model import LongNetLM, check_weights


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

    Every token is drawn after a full forward over all tokens before it, so each distribution is
    exactly the model's. Draws happen on the CPU, so devices with equal logits give equal texts for
    one seed.

    Args:
        model: The model. It is in evaluation mode until the last token is drawn or the iterator is
            closed.
        prompt: Token ids, at least one.
        max_new_tokens: Number of tokens to yield, at least 1.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Number of the most likely tokens to draw among; None means all.
        seed: Of the draws.

    Yields:
        One token id after the other.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the prompt is empty or holds an unknown token, a number is out of range, or
            the model is on the meta device.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=1,
        ...                   dim_feedforward=64, segment_lengths=[8], dilation_rates=[1])
        >>> len(list(generate(model, b"def ", max_new_tokens=5)))
        5
    """
    check_weights(model)
    last = model.config.num_tokens - 1
    tokens = [check_integer("a token of prompt", x, at_least=0, at_most=last) for x in prompt]
    if not tokens:
        raise ValueError("prompt is empty; it must hold at least one token to continue from.")
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
    temperature = check_number("temperature", temperature, at_least=0)
    top_k = None if top_k is None else check_integer("top_k", top_k, at_least=1)
    seed = check_integer("seed", seed, at_least=-(2**63), at_most=2**64 - 1)
    return _sample(model, tokens, max_new_tokens, temperature, top_k, seed)


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
