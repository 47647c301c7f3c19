"""How to train, as data: the numbers of a run, and the presets they start from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dilated_core.checks import answers_names, check_bool, check_choice, check_integer, check_number

from dilated_models.config import PAPER_SIZES
from dilated_models.training.out_of_memory import POLICIES

_INTEGERS: dict[str, dict[str, int]] = {
    "steps": {"at_least": 1, "at_most": 2**62},  # `len` counts no more
    "batch_size": {"at_least": 1},
    "accumulation": {"at_least": 1},
    "seq_len": {"at_least": 1},
    "warmup_steps": {"at_least": 0},
    "seed": {"at_least": 0, "at_most": 2**64 - 1},
    "validation_tokens": {"at_least": 1},
    "final_validation_tokens": {"at_least": 1},
    "validate_every": {"at_least": 1},
    "checkpoint_every": {"at_least": 1},
    "sample_every": {"at_least": 0},
}
_NUMBERS: dict[str, dict[str, Any]] = {
    "learning_rate": {"above": 0},
    "final_share": {"at_least": 0, "at_most": 1},
    "schedule_power": {"above": 0},
    "weight_decay": {"at_least": 0},
    "beta1": {"at_least": 0, "below": 1},
    "beta2": {"at_least": 0, "below": 1},
    "gradient_clip": {"at_least": 0},
    "validation_share": {"above": 0, "below": 1},
    "warmup_copies": {"at_least": 0, "at_most": 1},
    "growth": {"above": 0, "at_most": 1},
}


@answers_names({})
@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """The numbers of a training run.

    Args:
        steps: Number of optimiser steps.
        planned_steps: Steps of which `growth` and `warmup_copies` are shares; None: `steps`. A
            resumed run with other `steps` keeps the number that it began with: else windows would
            shrink again, and rows would come twice or never.
        batch_size: Rows per step. A row is cut into windows where a document begins.
        accumulation: Number of parts in which a batch is computed, to save memory; divides
            `batch_size`.
        seq_len: Row length and longest window, in tokens.
        first_seq_len: Longest window of the first steps, in tokens. Windows double in length until
            `seq_len`, and a row holds several of the short ones, so all steps have the same number
            of tokens. None: `seq_len` from the start.
        growth: Share of the steps after which windows have their full length, in (0, 1].
        warmup_copies: Share of the steps, from the first, that train on edited copies of the text
            instead of the text itself; see `dilated_models.text.copies`.
        learning_rate: Peak, after warm-up.
        warmup_steps: Steps of linear warm-up.
        schedule: Curve of the learning rate after warm-up: `"cosine"`, or `"polynomial"`, which
            falls with (1 − progress)^`schedule_power`; progress grows from 0 to 1.
        schedule_power: Exponent of the polynomial; 1 is a straight line.
        final_share: Learning rate at the end of the schedule, as a share of the peak.
        weight_decay: AdamW's, on the weights of linear layers only.
        beta1: AdamW's decay of the gradient's mean.
        beta2: AdamW's decay of the squared gradient's mean.
        gradient_clip: Largest gradient norm; larger gradients are scaled down to it. 0: any.
        seed: Of initialisation, data order and dropout.
        dtype: `"float32"`, or `"bfloat16"` for matrix products under autocast.
        validation_share: Share of the text held out, in (0, 1).
        validation_tokens: Targets scored in a validation during training.
        final_validation_tokens: Targets scored at the end.
        validate_every: Steps between validations.
        checkpoint_every: Steps between checkpoints.
        sample_every: Steps between samples, with the contextwise loss at that step; 0: only at the
            end.
        on_out_of_memory: What to do if a step does not fit into memory: `"stop"`; `"halve"`, which
            computes the batch in twice as many parts; or `"checkpoint"`, which recomputes blocks in
            the backward pass. The batch stays the same, and what was done is recorded.
        tensorboard: Whether metrics also go to files for TensorBoard (extra `tensorboard`).

    Raises:
        TypeError: If a value has the wrong type, or a name is unknown or missing.
        ValueError: If a value is out of range.
    """

    steps: int
    planned_steps: int | None = None
    batch_size: int
    accumulation: int = 1
    seq_len: int
    first_seq_len: int | None = None
    growth: float = 0.5
    warmup_copies: float = 0.0
    learning_rate: float
    warmup_steps: int
    schedule: str = "cosine"
    schedule_power: float = 1.0
    final_share: float = 0.1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    gradient_clip: float = 2.0
    seed: int = 0
    dtype: str = "float32"
    validation_share: float = 0.05
    validation_tokens: int = 1 << 15
    final_validation_tokens: int = 1 << 17
    validate_every: int
    checkpoint_every: int
    sample_every: int = 0
    on_out_of_memory: str = "stop"
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for name, bounds in _INTEGERS.items():
            self._set(name, check_integer(name, getattr(self, name), **bounds))
        for name, bounds in _NUMBERS.items():
            self._set(name, check_number(name, getattr(self, name), **bounds))
        check_choice("dtype", self.dtype, ("float32", "bfloat16"))
        check_choice("on_out_of_memory", self.on_out_of_memory, POLICIES)
        check_bool("tensorboard", self.tensorboard)
        check_choice("schedule", self.schedule, ("cosine", "polynomial"))
        if self.schedule == "cosine" and self.schedule_power != 1:
            raise ValueError(
                f'schedule_power is {self.schedule_power:g} and schedule "cosine", which has no '
                f'power; leave schedule_power out, or use the schedule "polynomial".'
            )
        if self.planned_steps is not None:
            bounds = _INTEGERS["steps"]
            self._set("planned_steps", check_integer("planned_steps", self.planned_steps, **bounds))
        if self.first_seq_len is not None:
            first = check_integer("first_seq_len", self.first_seq_len, at_least=1)
            self._set("first_seq_len", first)
            if first > self.seq_len:
                raise ValueError(
                    f"first_seq_len is {first} and seq_len {self.seq_len}; first_seq_len must be "
                    f"at most seq_len, because windows only grow."
                )
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"accumulation is {self.accumulation} and batch_size {self.batch_size}; "
                f"accumulation must divide batch_size, so that all parts are equally large."
            )

    def _set(self, name: str, value: object) -> None:
        """Replace a value by its checked form."""
        object.__setattr__(self, name, value)

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of a step, from 0: linear warm-up, then the schedule to the final share.

        A pure function of the step, so a resumed run follows the same curve.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        progress = min(1.0, progress)
        if self.schedule == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * progress))
        else:
            left = (1 - progress) ** self.schedule_power
        return self.learning_rate * (self.final_share + (1 - self.final_share) * left)

    def window_at(self, step: int) -> int:
        """Longest window of a step, from 0, in tokens; a pure function of the step."""
        first, grown = self.first_seq_len, self.growth * (self.planned_steps or self.steps)
        if first is None or step >= grown:
            return self.seq_len
        doublings = math.ceil(math.log2(self.seq_len / first))
        return min(self.seq_len, first << int(step / grown * doublings))

    @property
    def copied_steps(self) -> int:
        """Number of steps, from the first, that train on edited copies."""
        return min(self.steps, round(self.warmup_copies * (self.planned_steps or self.steps)))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainingConfig:
        """Inverse of `to_dict`; refuses unknown and missing names."""
        return cls(**fields)


class Preset(NamedTuple):
    """A model and the numbers of a run for it.

    Attributes:
        model: Fields of `LongNetConfig`, without `num_tokens`.
        training: Fields of `TrainingConfig`.
        summary: Time and hardware, in one line.
    """

    model: dict[str, Any]
    training: dict[str, Any]
    summary: str


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        model={
            "d_model": 96,
            "nhead": 4,
            "num_decoder_layers": 3,
            "dim_feedforward": 384,
            # No border of 512 is one of 768 before 1536, so every query sees the text before it.
            "segment_lengths": (512, 768, 1024),
            "dilation_rates": (1, 1, 4),
            "tie_embeddings": True,
            "positions": "rotary",
            "key_conv": 4,
        },
        # Copying is learnt first in short windows, and through segments of rate 1.
        training={
            "steps": 1800,
            "batch_size": 1,
            "seq_len": 1024,
            "first_seq_len": 128,
            "growth": 0.2,
            "warmup_copies": 0.2,
            "learning_rate": 4e-3,
            "warmup_steps": 100,
            "validate_every": 600,
            "checkpoint_every": 300,
        },
        summary="minutes on two CPU cores",
    ),
    "small": Preset(
        model={
            "d_model": 512,
            "nhead": 8,
            "num_decoder_layers": 8,
            "dim_feedforward": 2048,
            "segment_lengths": (512, 1024, 2048, 4096, 8192),
            "dilation_rates": (1, 2, 4, 6, 12),
            "activation": "gelu",
            "tie_embeddings": True,
        },
        training={
            "steps": 10_000,
            "batch_size": 8,
            "seq_len": 8192,
            "learning_rate": 1e-3,
            "warmup_steps": 500,
            "validation_tokens": 1 << 18,
            "final_validation_tokens": 1 << 20,
            "validate_every": 500,
            "checkpoint_every": 500,
        },
        summary="hours on one GPU",
    ),
    "base": Preset(
        model={
            **PAPER_SIZES["base"],
            "segment_lengths": (2048, 4096, 8192, 16384, 32768),
            "dilation_rates": (1, 2, 4, 6, 12),
            "activation_checkpointing": True,
        },
        training={
            "steps": 300_000,
            "batch_size": 16,
            "accumulation": 16,
            "seq_len": 32_768,
            "learning_rate": 6e-4,
            "warmup_steps": 750,
            "validation_tokens": 1 << 20,
            "final_validation_tokens": 1 << 22,
            "validate_every": 1000,
            "checkpoint_every": 1000,
        },
        summary="the paper's base model: 12 layers of 768, half a million tokens a step",
    ),
}
