"""Cross-validated fine-tuning of a slide encoder on labelled slides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from dilated_core.checks import check_bool, check_choice, check_integer, check_number
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from dilated_models.pathology.classifier import (
    SlideClassifier,
    learning_rate,
    parameter_groups,
)
from dilated_models.pathology.coordinates import place
from dilated_models.pathology.embedding import slide_input
from dilated_models.pathology.features import read_features
from dilated_models.pathology.labels import LabelledSlides
from dilated_models.pathology.orders import ORDERS
from dilated_models.slide.recipes import RECIPES

_SLIDES_OF_BASE_RATE = 256


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig:
    """Options of the fine-tuning; the defaults are those published for PANDA (run_panda.sh).

    Attributes:
        epochs: Passes over the training slides.
        warmup_epochs: Epochs in which the rate rises.
        base_lr: Peak rate at 256 slides per step; the peak is `base_lr` · `accumulation` / 256.
        min_lr: The last rate.
        weight_decay: AdamW's, of matrices.
        layer_decay: Factor of the rate from a layer to the one below.
        accumulation: Slides per step. The last step of an epoch takes those that are left.
        layers: Hidden states that the classifier reads.
        freeze: Whether only the classifier is trained.
        order: Of the tiles, as in `tile_order`.
        level0_tile: Whether a grid cell is as large as a tile on level 0; else 256 pixels.
        seed: Of the order of slides, dropout and the classifier's weights.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is out of range.
    """

    epochs: int = 5
    warmup_epochs: float = 1.0
    base_lr: float = 2e-3
    min_lr: float = 1e-6
    weight_decay: float = 0.05
    layer_decay: float = 0.95
    accumulation: int = 32
    layers: Sequence[int] = (11,)
    freeze: bool = False
    order: str = "row-major"
    level0_tile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulation"):
            check_integer(name, getattr(self, name), at_least=1)
        check_integer("seed", self.seed, at_least=0)
        check_number("base_lr", self.base_lr, above=0)
        check_number("layer_decay", self.layer_decay, above=0, at_most=1)
        for name in ("warmup_epochs", "min_lr", "weight_decay"):
            check_number(name, getattr(self, name), at_least=0)
        if not self.layers:
            raise ValueError("layers is empty; it must name at least one hidden state.")
        for layer in self.layers:
            check_integer("an entry of layers", layer)
        for name in ("freeze", "level0_tile"):
            check_bool(name, getattr(self, name))
        check_choice("order", self.order, ORDERS)

    @property
    def peak_lr(self) -> float:
        """The highest rate of the layers that are closest to the output."""
        return self.base_lr * self.accumulation / _SLIDES_OF_BASE_RATE


@dataclass(frozen=True)
class StepReport:
    """One step of the fine-tuning.

    Attributes:
        epoch: Counted from 0.
        slides: Slides of this epoch so far.
        loss: Mean over the slides of this step.
    """

    epoch: int
    slides: int
    loss: float


def fine_tune(
    model: SlideClassifier,
    slides: LabelledSlides,
    chosen: Sequence[int],
    config: FineTuningConfig,
    *,
    autocast: torch.dtype | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
) -> None:
    """Train a classifier and, unless frozen, its encoder.

    The loss of a step is the mean over its slides. Each slide is read when its turn comes.

    Args:
        model: Trained in place, and left in evaluation mode.
        slides: The slides.
        chosen: Indices of those to train on.
        config: How.
        autocast: Dtype of matrix products; None: that of the weights.
        on_step: Called after each step.

    Raises:
        FloatingPointError: If a loss is not finite.
        ValueError: As `read_features`.
    """
    model.train()
    model.slide_encoder.requires_grad_(not config.freeze)
    if config.freeze:
        model.slide_encoder.eval()
    groups = parameter_groups(
        model, weight_decay=config.weight_decay, layer_decay=config.layer_decay
    )
    optimizer = torch.optim.AdamW(groups, lr=config.peak_lr)
    rng = np.random.default_rng(config.seed)
    for epoch in range(config.epochs):
        order = rng.permutation(np.asarray(chosen, dtype=np.int64))
        for start in range(0, len(order), config.accumulation):
            rate = learning_rate(
                epoch + start / len(order),
                peak=config.peak_lr,
                floor=config.min_lr,
                warmup=config.warmup_epochs,
                epochs=config.epochs,
            )
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            step = order[start : start + config.accumulation]
            total = 0.0
            for index in step.tolist():
                loss = _loss(model, slides, index, config, autocast) / len(step)
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
                total += float(loss.detach())
            if not np.isfinite(total):
                raise FloatingPointError(
                    f"the loss is {total} in epoch {epoch}; it must be finite, so use a smaller "
                    f"base_lr, or float32."
                )
            optimizer.step()
            optimizer.zero_grad()
            on_step(StepReport(epoch, start + len(step), total))
    model.eval()


def predict(
    model: SlideClassifier,
    slides: LabelledSlides,
    chosen: Sequence[int],
    config: FineTuningConfig,
    *,
    autocast: torch.dtype | None = None,
) -> NDArray[np.float64]:
    """Class probabilities of some slides, `(len(chosen), C)`."""
    model.eval()
    rows: list[NDArray[np.float64]] = []
    with torch.no_grad():
        for index in chosen:
            logits = _logits(model, slides, index, config, autocast)
            rows.append(logits[0].double().softmax(-1).cpu().numpy())
    return np.stack(rows)


def _loss(
    model: SlideClassifier,
    slides: LabelledSlides,
    index: int,
    config: FineTuningConfig,
    autocast: torch.dtype | None,
) -> Tensor:
    logits = _logits(model, slides, index, config, autocast)
    return cross_entropy(logits.float(), torch.tensor([slides.labels[index]]).to(logits.device))


def _logits(
    model: SlideClassifier,
    slides: LabelledSlides,
    index: int,
    config: FineTuningConfig,
    autocast: torch.dtype | None,
) -> Tensor:
    slide = read_features(slides.sources[index])
    recipe = RECIPES["trident" if config.level0_tile else "official"]
    placement = place(slide, recipe)
    encoder = model.slide_encoder
    device = encoder.cls_token.device
    encoder.tile_size = placement.tile_size
    given = slide_input(slide, placement, config.order, device)
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        return model(given.tiles, given.coords)
