"""A slide encoder that is called as the published one: a list comes back."""

from __future__ import annotations

import warnings

import torch
from dilated_core.checks import check_bool, check_tensor
from torch import Tensor

from dilated_models.slide.config import SlideEncoderConfig
from dilated_models.slide.encoder import LongNetSlideEncoder
from dilated_models.slide.recipes import Recipe, embed_by_recipe


class UntrainedClassTokenWarning(UserWarning):
    """The class token of published weights is used, which the pretraining did not train."""


def warn_of_class_token(*, stacklevel: int = 2) -> None:
    """Warn that an embedding is the class token of weights that were not fine-tuned."""
    warnings.warn(
        "the slide embedding is the class token, which GigaPath's pretraining did not train (its "
        "demo/4_load_slide_encoder.py says so); pass global_pool=True, or a recipe that takes the "
        "mean over tiles, or tuned=True if these weights were fine-tuned with the class token.",
        UntrainedClassTokenWarning,
        stacklevel=stacklevel + 1,
    )


class DropInSlideEncoder(LongNetSlideEncoder):
    """`LongNetSlideEncoder` with the calls of GigaPath's `LongNetViT`; `create_model` builds it.

    Args:
        config: A `SlideEncoderConfig`.
        recipe: What a call without `all_layer_embed` returns; None: as the published code.
        warns_of_class_token: Whether the first call in evaluation mode that returns the class token
            warns, as long as no optimizer has changed it.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        config: SlideEncoderConfig,
        *,
        recipe: Recipe | None = None,
        warns_of_class_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype)
        self.recipe = recipe
        self._warns_of_class_token = warns_of_class_token
        self._class_token_version: int | None = None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, coords: Tensor, all_layer_embed: bool = False
    ) -> list[Tensor]:
        """Embed slides, as the published `forward` does.

        Args:
            x: `(B, L, in_chans)`, or `(L, in_chans)` of one slide.
            coords: `(B, L, 2)`, or `(L, 2)`.
            all_layer_embed: Whether to return all depth + 1 hidden states, pooled.

        Returns:
            A list of `(B, E)`: one, or depth + 1 with `all_layer_embed`.

        Raises:
            TypeError, ValueError: As `LongNetSlideEncoder.forward`.
        """
        check_tensor("x", x)
        check_tensor("coords", coords)
        check_bool("all_layer_embed", all_layer_embed)
        if x.dim() == 2 and coords.dim() == 2:
            x, coords = x[None], coords[None]
        self._warn_once()
        if all_layer_embed:
            return list(self.embed(x, coords, all_layers=True).unbind())
        if self.recipe is None:
            return [self.embed(x, coords)]
        return [embed_by_recipe(self, self.recipe, x, coords)]

    def _warn_once(self) -> None:
        if not self._warns_of_class_token or self.training or self.config.global_pool:
            return
        self._warns_of_class_token = False
        if self.cls_token._version == self._class_token_version:
            warn_of_class_token(stacklevel=5)  # past nn.Module's two frames

    def mark_untuned(self) -> None:
        """Remember the class token as it is: a later change in place, as by a step, is tuning."""
        self._class_token_version = self.cls_token._version
