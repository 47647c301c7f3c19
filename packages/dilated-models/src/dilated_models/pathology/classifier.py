"""A slide encoder with a linear layer for classes, and the learning rates of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dilated_models.slide.encoder import LongNetSlideEncoder


class SlideClassifier(nn.Module):
    """Logits of classes from the pooled hidden states of some layers, as GigaPath is fine-tuned.

    Args:
        encoder: Trained with it.
        num_classes: Number of logits.
        layers: Indices into the depth + 1 hidden states before the encoder's final LayerNorm,
            negative from the end; their embeddings are put side by side.
    """

    def __init__(
        self, encoder: LongNetSlideEncoder, num_classes: int, *, layers: Sequence[int]
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.slide_encoder = encoder
        width = len(self.layers) * encoder.config.embed_dim
        weight = encoder.cls_token
        self.classifier = nn.Linear(width, num_classes, device=weight.device, dtype=weight.dtype)

    def forward(self, tiles: Tensor, coords: Tensor) -> Tensor:
        """Logits `(B, num_classes)` of tiles `(B, L, in_chans)` at coords `(B, L, 2)`."""
        states = self.slide_encoder(tiles, coords, all_layers=True)
        return self.classifier(torch.cat([states[layer] for layer in self.layers], dim=-1))


def parameter_groups(
    model: SlideClassifier, *, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """One group for each layer and kind of parameter, with the factor `lr_scale` of its rate.

    Layer i of L, counted from 0, has the factor `layer_decay` ** (L − i), the class token
    `layer_decay` ** (L + 1), and everything else 1. That includes the projection of tiles, as in
    the published fine-tuning. Biases and LayerNorms have no weight decay.

    Args:
        model: Parameters that need no gradient are left out.
        weight_decay: Of matrices.
        layer_decay: In (0, 1].
    """
    depth = model.slide_encoder.config.depth
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = _layer_of(name, depth)
        decays = parameter.ndim > 1
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": layer_decay ** (depth + 1 - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer_of(name: str, depth: int) -> int:
    if name == "slide_encoder.cls_token":
        return 0
    if name.startswith("slide_encoder.encoder.layers."):
        return int(name.split(".")[3]) + 1
    return depth + 1


def learning_rate(epoch: float, *, peak: float, floor: float, warmup: float, epochs: int) -> float:
    """The rate after `epoch` epochs: a linear rise in `warmup` epochs, then half a cosine.

    Example:
        >>> [learning_rate(e, peak=1.0, floor=0.0, warmup=1, epochs=3) for e in (0, 0.5, 1, 2, 3)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = (epoch - warmup) / max(epochs - warmup, 1e-9)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
