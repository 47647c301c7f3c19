"""State dicts of a model whose embedding and output layer share one weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dilated_models.longnet.stacks import LongNetStacks


def complete_shared_weight(
    model: LongNetStacks, state: dict[str, Tensor], prefix: str, *rest: Any
) -> None:
    """Before loading: a shared weight may be stored under either name, or under both if equal."""
    errors: list[str] = rest[-1]
    names = [f"{prefix}embedding.weight", f"{prefix}output.weight"]
    stored = [state[name] for name in names if name in state]
    if not model.config.tie_embeddings or not stored:
        return
    first, last = stored[0], stored[-1]
    if first is not last and not first.is_meta and not torch.equal(first, last.to(first.device)):
        errors.append(
            f"{names[0]} and {names[1]} differ; they must be equal for a model with "
            f"tie_embeddings=True, so load them into one with tie_embeddings=False."
        )
    state |= dict.fromkeys(names, first)


def tie_again(model: LongNetStacks, incompatible_keys: object) -> None:
    """After loading: `assign=True` makes a new parameter for each name."""
    model.tie_weights()
