"""What a model gains from context, beside what others gain on the same targets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dilated_models.config import LongNetConfig
from dilated_models.longnet.language_model import LongNetLM
from dilated_models.text.streams import TokenStream
from dilated_models.training.config import TrainingConfig
from dilated_models.training.contextwise import (
    ContextLoss,
    Contextwise,
    contextwise,
    read_stretches,
)
from dilated_models.training.predictor import predictor_losses

if TYPE_CHECKING:
    from dilated_models.training.over_ranks import OverRanks

LOCAL_CONTEXT = 64
_RECORDED = Path(__file__).with_name("plain_training.json")
COMPARED = ("steps", "batch_size", "seq_len")  # together: the number of training tokens
_MOST_TARGETS = 1 << 15


@dataclass(frozen=True, kw_only=True)
class Gain:
    """The contextwise loss of a model, and of two others on the same targets.

    Attributes:
        contextwise: Of the model.
        predictor: Of `predictor_losses`; empty without a training text.
        plain: Of a recorded training of the same model on plain text alone; empty if there is no
            record of it.
    """

    contextwise: Contextwise
    predictor: tuple[ContextLoss, ...] = ()
    plain: tuple[ContextLoss, ...] = ()


def measure_gain(
    model: LongNetLM,
    text: TokenStream,
    *,
    seq_len: int,
    max_tokens: int | None,
    training: TokenStream | None = None,
    autocast: torch.dtype | None = None,
    before_batch: Callable[[int, int], None] | None = None,
    over: OverRanks | None = None,
) -> Gain | None:
    """The contextwise loss of a model, and of the counting predictor if there is a training text.

    Args:
        model: The model.
        text: The text to score.
        seq_len: Longest context, in tokens.
        max_tokens: A quarter of it, and 32768, are the most targets; None means 32768.
        training: Training text of the predictor.
        autocast, before_batch, over: As in `contextwise`.

    Returns:
        The losses, or None if no document of the text has more than 16 tokens.
    """
    stretches = read_stretches(text, seq_len=seq_len, max_targets=most_targets(max_tokens))
    if stretches is None:
        return None
    return Gain(
        contextwise=contextwise(
            model, text, stretches, autocast=autocast, before_batch=before_batch, over=over
        ),
        predictor=()
        if training is None
        else predictor_losses(stretches, training, num_tokens=model.config.num_tokens),
    )


def most_targets(max_tokens: int | None) -> int:
    """Targets of `measure_gain` where the text is long enough."""
    return _MOST_TARGETS if max_tokens is None else max(1, min(max_tokens // 4, _MOST_TARGETS))


def recorded_plain_training(
    model: LongNetConfig, training: TrainingConfig
) -> tuple[ContextLoss, ...]:
    """Contextwise loss of the same model after as many tokens of plain text of the library alone.

    Returns:
        The recorded losses; empty if this training has no copies itself or none is recorded.
    """
    if not training.copied_steps:
        return ()
    numbers = training.to_dict()
    records: list[dict[str, Any]] = json.loads(_RECORDED.read_text("utf-8"))
    for record in records:
        # A field that is younger than the record has its default there.
        if LongNetConfig.from_dict(record["model"]) == model and all(
            record["training"][name] == numbers[name] for name in COMPARED
        ):
            return tuple(ContextLoss(**row) for row in record["by_context"])
    return ()
