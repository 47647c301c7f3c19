"""What a LongNet of two sequences is, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from dilated_core.checks import answers_names, check_tensor
from torch import Tensor

from dilated_models.config import ELSEWHERE, LongNetConfig, PositionKind

TWO_SEQUENCES = ELSEWHERE | {
    "is_causal": "is passed to forward, as src_is_causal, tgt_is_causal and memory_is_causal"
}


@answers_names(TWO_SEQUENCES)
@dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(LongNetConfig):
    """Configuration of a `LongNet`: the fields of `LongNetConfig`, three with other defaults.

    Args:
        num_tokens: Vocabulary size of both sequences, which share an embedding. 0, the default:
            both are given as embeddings, and the results are states, not logits.
        num_encoder_layers: Blocks of the encoder, at least one.
        positions: As in `LongNetConfig`, but not `"alibi"`. `"rotary"` by default: xPos lets scores
            decay with the distance to earlier keys, and grow with the distance to later ones, which
            an encoder sees too.

    Raises:
        TypeError: If a value has the wrong type, or a name is unknown.
        ValueError: If a value is out of range or two values contradict each other.
    """

    _LEAST: ClassVar[dict[str, int]] = LongNetConfig._LEAST | {
        "num_tokens": 0,
        "num_encoder_layers": 1,
    }

    num_tokens: int = 0
    num_encoder_layers: int = 12
    positions: PositionKind = "rotary"

    def __post_init__(self) -> None:
        LongNetConfig.__post_init__(self)
        if self.positions == "alibi":
            raise ValueError(
                "positions is 'alibi'; ALiBi needs causal attention, and an encoder sees later "
                'positions too, so use positions="rotary".'
            )
        if self.tie_embeddings and not self.num_tokens:
            raise ValueError(
                "tie_embeddings is True and num_tokens 0; there is no embedding to share, so leave "
                "tie_embeddings out."
            )


def check_memory_states(
    config: LongNetConfig, memory: Tensor, hidden: Tensor | None, batch_size: int | None
) -> int:
    """Check the states of an encoder and their mask; returns the number of sequences.

    Raises:
        TypeError: If one is no tensor, or the mask is not bool.
        ValueError: If a shape does not fit.
    """
    check_tensor("memory", memory)
    if memory.dim() != 3 or memory.shape[2] != config.d_model:
        raise ValueError(
            f"memory has shape {tuple(memory.shape)}; it must be (batch, rows, {config.d_model}), "
            f"as LongNet.encode returns it."
        )
    if batch_size is not None and batch_size != len(memory):
        raise ValueError(
            f"batch_size is {batch_size} and memory has {len(memory)} sequences; they must be "
            f"equal, so leave batch_size out."
        )
    if hidden is not None:
        check_padding("memory_key_padding_mask", hidden, memory)
    return len(memory)


def check_padding(name: str, mask: Tensor, x: Tensor) -> None:
    """Check a mask of the rows of `x`, `(B, S, …)`.

    Raises:
        TypeError: If it is no bool tensor.
        ValueError: If its shape does not fit.
    """
    check_tensor(name, mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {mask.dtype}; it must be bool, True for padding.")
    if mask.shape != x.shape[:2]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:2])}, one value for "
            f"each row."
        )
