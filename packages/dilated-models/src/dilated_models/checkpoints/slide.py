"""GigaPath's slide encoders from their published weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dilated_models.checkpoints.files import Checkpoint, Weights, read_checkpoint
from dilated_models.checkpoints.names import (
    count_layers,
    load_strictly,
    without,
)
from dilated_models.encoder.names import published_name, with_published_names
from dilated_models.slide.config import ARCHITECTURES, SlideEncoderConfig, config_of
from dilated_models.slide.encoder import LongNetSlideEncoder

_POSITIONS = "pos_embed"  # a table that the published code computes and does not save


def slide_encoder_from_gigapath(
    weights: Weights,
    config: SlideEncoderConfig | Mapping[str, Any] | str | None = None,
    *,
    sha256: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LongNetSlideEncoder:
    """Prov-GigaPath's or GigaPath-Flash's slide encoder, or another of their architectures.

        encoder = slide_encoder_from_gigapath("slide_encoder.pth")
        embedding = encoder(tiles, coords)

    Args:
        weights: A state dict, or the path of a `.pth` or safetensors file; under the key "model",
            or bare; with the published names or those of a `LongNetSlideEncoder`.
        config: A `SlideEncoderConfig`, its fields as a dict, or the name of a published
            architecture. None: the published architecture whose shapes the weights have.
        sha256: The SHA-256 that the file must have; None: any. `encoder.weights_sha256` shows it.
        device: Of the parameters.
        dtype: Of the parameters; float32 if None.

    Returns:
        The encoder, in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an argument has the wrong type.
        ValueError: If the file is damaged or has another digest, or a weight is missing, extra or
            misshapen.
    """
    checkpoint = read_checkpoint(weights, sha256=sha256)
    config = slide_config(checkpoint.weights, config)
    encoder = LongNetSlideEncoder(config, device=device, dtype=dtype or torch.float32)
    load_slide_weights(encoder, checkpoint)
    return encoder.eval()


def load_slide_weights(encoder: LongNetSlideEncoder, checkpoint: Checkpoint) -> None:
    """Copy the weights of a file into a slide encoder, and keep the digest of the file.

    Raises:
        ValueError: If a weight is missing, extra or misshapen; nothing is copied then.
    """
    found = with_published_names(without(checkpoint.weights, [_POSITIONS]))
    owner = f"a slide encoder {_sizes(encoder.config)}"
    load_strictly(encoder, found, published_name, owner=owner)
    encoder.weights_sha256 = checkpoint.sha256


def gigapath_state_dict(encoder: LongNetSlideEncoder) -> dict[str, Tensor]:
    """The weights of a slide encoder under their published names, which the published code loads.

    Example:
        >>> encoder = LongNetSlideEncoder(in_chans=8, embed_dim=16, depth=1, num_heads=2)
        >>> "encoder.layers.0.self_attn.inner_attn_ln.weight" in gigapath_state_dict(encoder)
        True
    """
    return {published_name(name): tensor for name, tensor in encoder.state_dict().items()}


def slide_config(
    weights: Mapping[str, Tensor], config: SlideEncoderConfig | Mapping[str, Any] | str | None
) -> SlideEncoderConfig:
    """The config that a caller gives as in `slide_encoder_from_gigapath`, or that weights tell.

    Raises:
        TypeError: If it is of another type.
        ValueError: If weights do not tell it.
    """
    if isinstance(config, SlideEncoderConfig):
        return config
    if isinstance(config, str):
        return config_of(config)
    if isinstance(config, Mapping):
        return SlideEncoderConfig(**config)
    if config is not None:
        raise TypeError(
            f"config is a {type(config).__name__}; it must be a SlideEncoderConfig, a dict of its "
            f"fields, the name of an architecture, or None."
        )
    projection = weights.get("patch_embed.proj.weight", torch.empty(0, 0))
    depth = count_layers(weights, "encoder.layers.")
    for name, published in ARCHITECTURES.items():
        if (published.depth, published.embed_dim) == (depth, projection.shape[0]):
            return config_of(name, in_chans=projection.shape[-1])
    raise ValueError(
        f"the weights have {depth} layers of width {projection.shape[0]}, which no published "
        f"architecture has; give config, since the number of heads cannot be read from weights."
    )


def _sizes(config: SlideEncoderConfig) -> str:
    return (
        f"of {config.depth} layers, width {config.embed_dim}, feed-forward width "
        f"{config.ffn_dim} and {config.in_chans} input channels"
    )
