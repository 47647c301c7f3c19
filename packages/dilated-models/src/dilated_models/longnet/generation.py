"""Continue texts, one token at a time."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple

import torch
from dilated_core.checks import check_integer, check_number, is_listed
from torch import Tensor

from dilated_models.longnet.encoder_decoder import LongNet
from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig
from dilated_models.longnet.generation_cache import GenerationCache
from dilated_models.longnet.language_model import LongNetLM, check_weights, evaluating
from dilated_models.longnet.stacks import check_has_weights


class Sampling(NamedTuple):
    """How a token is drawn from its logits.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Number of the most likely tokens to draw among; None means all.
        top_p: Draw among the most likely tokens that together have at least this probability;
            1 means all.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    @classmethod
    def of(cls, temperature: float, top_k: int | None, top_p: float) -> Sampling:
        """Check the options.

        Raises:
            TypeError: If an option has the wrong type.
            ValueError: If an option is out of range.
        """
        return cls(
            check_number("temperature", temperature, at_least=0),
            None if top_k is None else check_integer("top_k", top_k, at_least=1),
            check_number("top_p", top_p, above=0, at_most=1),
        )

    def draw(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw one token from logits `(num_tokens,)`, in float64 on the CPU."""
        largest = logits.max()
        if not -torch.inf < largest < torch.inf:
            raise ValueError(
                f"the largest logit is {largest.item()}; it must be finite to draw a token, so the "
                f"weights hold NaN or infinity, or their dtype has too small a range."
            )
        if self.temperature == 0:
            return int(logits.argmax())
        if self.top_k is not None and self.top_k < len(logits):
            best = logits.topk(self.top_k)
            logits = torch.full_like(logits, -torch.inf)
            logits[best.indices] = best.values
        # Subtracting the largest first keeps a very low temperature from overflowing.
        probabilities = ((logits - largest) / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered = probabilities.sort(descending=True, stable=True)
            before = ordered.values.cumsum(-1) - ordered.values  # of the more likely tokens
            probabilities[ordered.indices[before >= self.top_p]] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: LongNetLM,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    cache: GenerationCache | None = None,
) -> Iterator[int]:
    """Sample a continuation, token by token.

    The prompt runs through the model once. Then each token costs one step against a
    `GenerationCache`, whose time and memory do not grow with the text. Draws happen on the CPU, so
    devices with equal logits give equal texts for one seed.

    Args:
        model: The model. It runs in evaluation mode, and has its own mode between tokens.
        prompt: Token ids, at least one.
        max_new_tokens: Number of tokens to yield, at least 1.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Number of the most likely tokens to draw among; None means all.
        top_p: Draw among the most likely tokens that together have at least this probability; 1
            means all.
        seed: Of the draws.
        cache: Holds a text, of which the prompt is the next part. The last token that is drawn is
            not in the cache, so begin the next prompt with it. None: the prompt begins the text.

    Yields:
        One token id after the other.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the prompt is empty or holds an unknown token, a number is out of range, the
            cache holds not one text, or the model is on the meta device.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=1,
        ...                   dim_feedforward=64, segment_lengths=[8], dilation_rates=[1])
        >>> len(list(generate(model, b"def ", max_new_tokens=5)))
        5
    """
    check_weights(model)
    tokens = _check_prompt("prompt", prompt, model)
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
    sampling = Sampling.of(temperature, top_k, top_p)
    seeds = seeds_from(seed, 1)
    if cache is not None and not isinstance(cache, GenerationCache):
        raise TypeError(f"cache is a {type(cache).__name__}; it must be a GenerationCache.")
    if cache is not None and cache.batch_size != 1:
        raise ValueError(f"cache holds {cache.batch_size} texts; it must hold 1, as prompt is one.")
    if cache is None:
        cache = GenerationCache(model, max_seq_len=len(tokens) + max_new_tokens)
    step = partial(_step_of_language_model, model, cache)
    return _only(_sample(model, step, [tokens], max_new_tokens, sampling, seeds))


def generate_batch(
    model: LongNetLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, ...]]:
    """Continue several prompts of any lengths together.

    Text i is what `generate(model, prompts[i], seed=seed + i)` gives, whatever the other prompts
    are, up to the rounding of logits: each text has its own position and its own draws.

    Args:
        model: As for `generate`.
        prompts: Token ids of each prompt, at least one each.
        max_new_tokens, temperature, top_k, top_p: As for `generate`.
        seed: Of the draws of the first text; each next one has the next seed.

    Yields:
        The next token id of every text.

    Raises:
        TypeError, ValueError: As `generate`.

    Example:
        >>> model = LongNetLM(num_tokens=256, d_model=32, nhead=4, num_decoder_layers=1,
        ...                   dim_feedforward=64, segment_lengths=[8], dilation_rates=[1])
        >>> steps = generate_batch(model, [b"def ", b"import os"], max_new_tokens=5)
        >>> first, second = zip(*steps)
        >>> len(first), len(second)
        (5, 5)
    """
    check_weights(model)
    if not is_listed(prompts):
        raise TypeError(f"prompts is {prompts!r}; it must be a list of prompts.")
    texts = [_check_prompt(f"prompts[{i}]", prompt, model) for i, prompt in enumerate(prompts)]
    if not texts:
        raise ValueError("prompts is empty; it must hold at least one prompt to continue.")
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
    sampling = Sampling.of(temperature, top_k, top_p)
    seeds = seeds_from(seed, len(texts))
    # A step decodes neighbours of equal length together.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    texts, seeds = [texts[i] for i in order], [seeds[i] for i in order]
    most = max(map(len, texts)) + max_new_tokens
    cache = GenerationCache(model, len(texts), max_seq_len=most)
    step = partial(_step_of_language_model, model, cache)
    return _restore(_sample(model, step, texts, max_new_tokens, sampling, seeds), order)


def generate_from(
    model: LongNet,
    src: Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    src_key_padding_mask: Tensor | None = None,
    src_is_causal: bool = False,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[int, ...]]:
    """Sample a target for each source, token by token.

    The encoder runs once. Each token then costs one step against a `GenerationCache`, and attention
    to all states of its source. Target i is what it is alone, up to the rounding of logits,
    whatever the padding, the other sources and the other prompts are.

    Args:
        model: The model. It runs in evaluation mode, and has its own mode between tokens.
        src: As for `LongNet.forward`, tokens or embeddings; B sources.
        prompts: B beginnings of targets, at least one token each, such as a token for the start.
        src_key_padding_mask: As for `LongNet.forward`; on either side.
        src_is_causal: As for `LongNet.forward`, and as the model was trained.
        max_new_tokens, temperature, top_k, top_p: As for `generate`.
        seed: Of the draws of the first target; each next one has the next seed.

    Yields:
        The next token id of every target.

    Raises:
        TypeError, ValueError: As `generate` and `LongNet.encode`; or if the model has no tokens, or
            there are not as many prompts as sources.

    Example:
        >>> from dilated_models import LongNet
        >>> model = LongNet(num_tokens=256, d_model=32, nhead=4, num_encoder_layers=1,
        ...                 num_decoder_layers=1, dim_feedforward=64, segment_lengths=[8],
        ...                 dilation_rates=[1])
        >>> src = torch.randint(256, (2, 20))
        >>> first, second = zip(*generate_from(model, src, [[0], [0]], max_new_tokens=5))
        >>> len(first), len(second)
        (5, 5)
    """
    check_has_weights(model)
    if not isinstance(model.config, EncoderDecoderConfig) or not model.config.num_tokens:
        raise ValueError(
            "model has no tokens to generate, or no source; it must be a LongNet with num_tokens."
        )
    if not is_listed(prompts):
        raise TypeError(f"prompts is {prompts!r}; it must be a list of prompts.")
    texts = [_check_prompt(f"prompts[{i}]", prompt, model) for i, prompt in enumerate(prompts)]
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens, at_least=1)
    sampling = Sampling.of(temperature, top_k, top_p)
    with evaluating(model), torch.no_grad():
        memory = model.encode(src, src_key_padding_mask, is_causal=src_is_causal)
    if len(texts) != len(memory) or not texts:
        raise ValueError(
            f"prompts holds {len(texts)} prompts and src {len(memory)} sources; there must be one "
            f"prompt for each source, at least one."
        )
    cache = GenerationCache(
        model,
        max_seq_len=max(map(len, texts)) + max_new_tokens,
        memory=memory,
        memory_key_padding_mask=src_key_padding_mask,
    )
    step = partial(_step_of_longnet, model, cache)
    return _sample(model, step, texts, max_new_tokens, sampling, seeds_from(seed, len(texts)))


def _step_of_language_model(
    model: LongNetLM, cache: GenerationCache, tokens: Tensor, lengths: list[int] | None
) -> Tensor:
    return model(tokens, cache=cache, lengths=lengths)


def _step_of_longnet(
    model: LongNet, cache: GenerationCache, tokens: Tensor, lengths: list[int] | None
) -> Tensor:
    return model.step(tokens, cache, lengths)


def _only(steps: Generator[tuple[int, ...]]) -> Iterator[int]:
    """The tokens of the only text."""
    with closing(steps):
        for (token,) in steps:
            yield token


def _restore(steps: Generator[tuple[int, ...]], order: list[int]) -> Iterator[tuple[int, ...]]:
    """The tokens of texts that were put in another order, in the order of the caller."""
    places = sorted(range(len(order)), key=order.__getitem__)
    with closing(steps):
        for step in steps:
            yield tuple(step[place] for place in places)


def _check_prompt(name: str, prompt: object, model: LongNetLM | LongNet) -> list[int]:
    if not is_listed(prompt):
        raise TypeError(f"{name} is {prompt!r}; it must be a list of token ids.")
    if isinstance(prompt, Tensor) and prompt.is_meta:
        raise ValueError(f"{name} is on meta and holds no values; give it on the CPU.")
    last = model.config.num_tokens - 1
    tokens = [check_integer(f"a token of {name}", x, at_least=0, at_most=last) for x in prompt]
    if not tokens:
        raise ValueError(f"{name} is empty; it must hold at least one token to continue from.")
    return tokens


def seeds_from(seed: int, count: int) -> list[int]:
    """`count` seeds from `seed` on; after 2⁶⁴ − 1 comes 0.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it has more than 64 bits.
    """
    seed = check_integer("seed", seed, at_least=-(2**63), at_most=2**64 - 1)
    return [seed + i if seed + i < 2**64 else seed + i - 2**64 for i in range(count)]


def _sample(
    model: LongNetLM | LongNet,
    step: Callable[[Tensor, list[int] | None], Tensor],
    prompts: list[list[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seeds: list[int],
) -> Generator[tuple[int, ...]]:
    """Draw tokens; `step` appends tokens to the texts and returns the logits of their last ones."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    device = model.first_weight.device
    lengths = [len(prompt) for prompt in prompts]
    padded = [prompt + [0] * (max(lengths) - len(prompt)) for prompt in prompts]
    with evaluating(model):
        logits = step(torch.tensor(padded, device=device), lengths)
    for count in range(1, max_new_tokens + 1):
        drawn = tuple(
            sampling.draw(row, generator)
            for row, generator in zip(logits[:, 0].cpu().double(), generators, strict=True)
        )
        yield drawn
        if count < max_new_tokens:
            with evaluating(model):
                logits = step(torch.tensor(drawn, device=device)[:, None], None)
