"""A slide encoder for commands: published weights, and options of its architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dilated_models.checkpoints.files import read_checkpoint
from dilated_models.checkpoints.slide import load_slide_weights, slide_config
from dilated_models.slide.config import with_options
from dilated_models.slide.encoder import LongNetSlideEncoder


def load_encoder(
    path: Path,
    architecture: str | None,
    *,
    sha256: str | None,
    device: torch.device,
    **options: Any,
) -> LongNetSlideEncoder:
    """The slide encoder of a file, in evaluation mode.

    Args:
        path: Of the weights.
        architecture: Its name; None: found from the shapes of the weights.
        sha256: The digest that the file must have; None: any.
        device: Of the parameters.
        **options: Fields of `SlideEncoderConfig`; those that are None are left as they are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: As `slide_encoder_from_gigapath`.
    """
    checkpoint = read_checkpoint(path, sha256=sha256)
    given = {name: value for name, value in options.items() if value is not None}
    config = with_options(slide_config(checkpoint.weights, architecture), **given)
    encoder = LongNetSlideEncoder(config, device=device, dtype=torch.float32)
    load_slide_weights(encoder, checkpoint)
    return encoder.eval()
