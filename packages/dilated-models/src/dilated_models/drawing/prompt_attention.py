"""Which tokens the last tokens of a prompt attended to, in each layer and head of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from dilated_core.inspection.attention_rows import AttentionRows, attention_rows
from numpy.typing import NDArray
from torch import nn

from dilated_models.longnet.language_model import LongNetLM


class PromptAttention(NamedTuple):
    """Rows of the attention matrix of each layer and head.

    Attributes:
        rows: N positions of the queries, ascending.
        positions: `(H, N, K)`, of the keys that a query sees, ascending; −1 behind the last one.
            The same in every layer.
        probabilities: `(L, H, N, K)`; 0 where `positions` is −1.
    """

    rows: list[int]
    positions: NDArray[np.int64]
    probabilities: NDArray[np.float32]


def attend_to_prompt(model: LongNetLM, tokens: Sequence[int], *, num_rows: int) -> PromptAttention:
    """Run the model once over a prompt; q and k are read where the layers of its decoder attend.

    Only the rows asked for are computed, so a long prompt costs little more than its forward pass.

    Args:
        model: In evaluation mode.
        tokens: The prompt; at least one.
        num_rows: How many of the last tokens; all if there are fewer.

    Raises:
        ValueError: If there is no token, `num_rows` is below 1, or the model has a `local_window`.
    """
    if not tokens:
        raise ValueError("the prompt has no token; it must have at least 1.")
    if window := model.config.local_window:
        raise ValueError(
            f"local_window of the model is {window}; only the attention of dilated branches can be "
            f"shown, so give a model without one."
        )
    if num_rows < 1:
        raise ValueError(f"num_rows is {num_rows}; it must be at least 1.")
    rows = list(range(max(0, len(tokens) - num_rows), len(tokens)))
    layers: list[AttentionRows] = []

    def read(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        q, k = inputs[:2]
        is_causal = options["is_causal"]
        scale, pattern = model.config.attention.scale, model.config.pattern
        layers.append(attention_rows(q, k, pattern, rows, is_causal=is_causal, scale=scale))

    # Here q and k are as attention receives them: convolved and rotated.
    handles = [
        cast(Any, block).attention.attention.register_forward_pre_hook(read, with_kwargs=True)
        for block in model.blocks
    ]
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens], device=model.embedding.weight.device))
    finally:
        for handle in handles:
            handle.remove()
    return PromptAttention(
        rows,
        layers[0].positions.cpu().numpy(),
        torch.stack([layer.probabilities[0] for layer in layers]).float().cpu().numpy(),
    )
