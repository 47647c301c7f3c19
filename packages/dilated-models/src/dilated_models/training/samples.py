"""What a model writes and what it gains from context, at one step of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

from dilated_models.longnet.generation import generate
from dilated_models.longnet.language_model import LongNetLM
from dilated_models.text.streams import TokenStream
from dilated_models.text.vocabulary import Vocabulary
from dilated_models.training.contextwise import ContextLoss
from dilated_models.training.gain import measure_gain
from dilated_models.training.loop import TrainingState

_SAMPLE_TOKENS = 200
_SAMPLE_PROMPT_TOKENS = 80


class Sample(NamedTuple):
    """Attributes of a model in training.

    Attributes:
        prompt: The beginning of the validation text.
        sample: Text that the model generated after it.
        by_context: The loss of the same targets with growing context; empty if no document is long
            enough to tell.
    """

    prompt: str
    sample: str
    by_context: tuple[ContextLoss, ...]

    def __str__(self) -> str:
        losses = ", ".join(f"{x.context}: {x.bits_per_byte:.3f}" for x in self.by_context)
        lines = [f"bits per byte after so many tokens of context: {losses}"] if losses else []
        return "\n".join([*lines, f"{self.prompt}|{self.sample}"])

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return self._asdict() | {"by_context": [dataclasses.asdict(x) for x in self.by_context]}


def sample_now(
    state: TrainingState,
    vocabulary: Vocabulary,
    validation: TokenStream,
    *,
    max_tokens: int,
    check: Callable[[], None],
) -> Sample:
    """A sample and the contextwise loss; the random state of training stays as it is.

    Args:
        state: Whose model it is. On several processes all of them call this.
        vocabulary: Of its tokens.
        validation: The text that the prompt and the targets are from.
        max_tokens: As of `measure_gain`.
        check: Called often; an exception that it raises ends the work.
    """
    with state.reporting():
        prompt, sample = sample_text(state.model, vocabulary, validation, check)
        gain = measure_gain(
            state.model,
            validation,
            seq_len=state.config.seq_len,
            max_tokens=max_tokens,
            autocast=state.autocast,
            before_batch=lambda done, total: check(),
            over=state.over,
        )
    return Sample(prompt, sample, () if gain is None else gain.contextwise.by_context)


def sample_text(
    model: LongNetLM, vocabulary: Vocabulary, validation: TokenStream, check: Callable[[], None]
) -> tuple[str, str]:
    """The first tokens of the validation text, and a text that the model generates after them."""
    start = validation.text_of(0, min(_SAMPLE_PROMPT_TOKENS, len(validation)))
    prompt = start.decode("utf-8", "ignore")
    tokens = vocabulary.encode(prompt) or [0]
    sampled: list[int] = []
    for token in generate(model, tokens, max_new_tokens=_SAMPLE_TOKENS, temperature=0.8, seed=0):
        sampled.append(token)
        check()
    return prompt, vocabulary.decode(sampled)
