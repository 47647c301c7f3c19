"""The training loop of all experiments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from dilated_models import LongNetLM
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LEARNING_RATE = 4e-3
Batch = tuple[Tensor, Tensor]  # inputs and targets, (B, S)


def fit(model: LongNetLM, batch: Callable[[int], Batch], *, steps: int) -> list[float]:
    """Train on `batch(step)` for every step; returns the losses, in nats."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    losses: list[Tensor] = []
    for step in range(steps):
        inputs, targets = (x.to(device) for x in batch(step))
        loss = cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()
