"""LongViT from its published weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dilated_models.checkpoints.files import Weights, read_checkpoint
from dilated_models.checkpoints.names import count_layers, load_strictly
from dilated_models.encoder.names import published_name, with_published_names
from dilated_models.slide.longvit import LongViT

_KEYS = ("teacher", "model", "module")
_PREFIXES = ("module.", "backbone.", "model.")
_HEAD = "head."  # DINO's projection, which only the pretraining uses


def longvit_from_torchscale(
    weights: Weights,
    *,
    image_size: int | None = None,
    num_heads: int = 16,
    sha256: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> LongViT:
    """LongViT from the weights of its DINO pretraining, or from bare weights.

    Args:
        weights: A state dict, or the path of a file; under the keys "teacher", "model" or "module",
            or bare. DINO's head is left out.
        image_size: Side of the images, in pixels; None: that of the weights. The learned positions
            are resized bicubically for another size, as in the published code, but in float32.
        num_heads: 16 in the published model; cannot be read from weights.
        sha256: The SHA-256 that the file must have; None: any.
        device: Of the parameters.
        dtype: Of the parameters; float32 if None.
        **options: As for `LongViT`.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or has another digest, or a weight is missing, extra or
            misshapen.
    """
    found = {
        _bare(name): tensor
        for name, tensor in read_checkpoint(weights, keys=_KEYS, sha256=sha256).weights.items()
    }
    found = with_published_names(
        {name: tensor for name, tensor in found.items() if not name.startswith(_HEAD)}
    )
    projection, positions = found.get("patch_embed.proj.weight"), found.get("pos_embed")
    if projection is None or positions is None or projection.dim() != 4 or positions.dim() != 3:
        raise ValueError(
            "the weights have no patch_embed.proj.weight of four dimensions and no pos_embed of "
            "three; they must be those of a LongViT."
        )
    patch_size, per_side = projection.shape[-1], math.isqrt(positions.shape[1])
    size = per_side * patch_size if image_size is None else image_size
    model = LongViT(
        size,
        patch_size=patch_size,
        in_chans=projection.shape[1],
        embed_dim=projection.shape[0],
        depth=count_layers(found, "encoder.layers."),
        num_heads=num_heads,
        device=device,
        dtype=dtype or torch.float32,
        **options,
    )
    if per_side**2 == positions.shape[1] and size != per_side * patch_size:
        found["pos_embed"] = _resized(positions, size // patch_size)
    load_strictly(model, found, published_name, owner="a LongViT")
    return model.eval()


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _resized(positions: Tensor, per_side: int) -> Tensor:
    """A table of positions `(1, N, E)` for another number of patches per side."""
    old = math.isqrt(positions.shape[1])
    table = positions.float().view(1, old, old, -1).permute(0, 3, 1, 2)
    table = interpolate(table, size=(per_side, per_side), mode="bicubic", align_corners=False)
    return table.flatten(2).transpose(1, 2)
