"""The published interface of GigaPath's slide encoder: change the import, keep the calls.

    from dilated_models.slide_encoder import create_model  # was: from gigapath.slide_encoder

    model = create_model("slide_encoder.pth", "gigapath_slide_enc12l768d", 1536, global_pool=True)
    embedding = model(tile_embeddings, coords)[0]

No CUDA, flash-attn, fairscale or timm is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dilated_models.checkpoints.files import read_checkpoint
from dilated_models.checkpoints.slide import load_slide_weights
from dilated_models.slide.config import ARCHITECTURES, config_of
from dilated_models.slide.drop_in import DropInSlideEncoder, UntrainedClassTokenWarning
from dilated_models.slide.recipes import RECIPES, Recipe, recipe_called

__all__ = [
    "ARCHITECTURES",
    "RECIPES",
    "DropInSlideEncoder",
    "LongNetViT",
    "Recipe",
    "UntrainedClassTokenWarning",
    "create_model",
]

LongNetViT = DropInSlideEncoder
"""The published name of the class that `create_model` returns."""

_HUB = "hf_hub:"
_HUB_FILE = "slide_encoder.pth"


def create_model(
    pretrained: str | os.PathLike[str] | None,
    model_arch: str,
    in_chans: int,
    local_dir: str | os.PathLike[str] | None = None,
    *,
    recipe: str | None = None,
    global_pool: bool | None = None,
    sha256: str | None = None,
    tuned: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> DropInSlideEncoder:
    """A slide encoder with the interface of `gigapath.slide_encoder.create_model`.

        model = create_model("slide_encoder.pth", "gigapath_slide_enc12l768d", 1536)
        embeddings = model(x, coords)                           # [(B, E)]
        layers = model(x, coords, all_layer_embed=True)         # [(B, E)] · (depth + 1)

    Differences from the published function: a missing file or weight is an error, and never leaves
    random weights; an unknown option is an error; nothing is printed; the model is in evaluation
    mode.

    Args:
        pretrained: Path of a `.pth` or safetensors file; "hf_hub:owner/name" or
            "hf_hub:owner/name@revision" for `slide_encoder.pth` of a repository of the Hugging Face
            hub, which needs the package `huggingface_hub`; "" or None for random weights.
        model_arch: `"gigapath_slide_enc12l768d"` (Prov-GigaPath), `"gigapath_slide_enc12l384d"`
            (GigaPath-Flash), `"gigapath_slide_enc24l1024d"` or `"gigapath_slide_enc12l1536d"`.
        in_chans: Width of the tile embeddings: 1536, or 384 for GigaPath-Flash.
        local_dir: Folder for downloads, which get a folder of their repository's name in it; the
            cache of the hub if None.
        recipe: `"official"`, `"trident"`, `"slide2vec"`, `"lazyslide"` or `"raw2features"`: a call
            returns the embedding that this program takes, with its pooling, layer and norm. The
            caller gives coordinates and `model.tile_size` as that program does. None: as the
            published code.
        global_pool: Whether embeddings are means over tiles instead of the class token; False if
            None and there is no recipe.
        sha256: The SHA-256 that the file must have; None: any. `model.weights_sha256` shows it.
        tuned: Whether the weights were fine-tuned with the class token, so that its use needs no
            warning.
        device: Of the parameters.
        dtype: Of the parameters; float32 if None.
        **options: Other fields of `SlideEncoderConfig`, such as `max_wsi_size`, from which the
            pattern follows: the published fine-tuning passes 250000.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an argument has the wrong type or is unknown.
        ValueError: If the architecture or recipe is unknown, arguments contradict each other, or
            the weights do not fit.

    Example:
        >>> model = create_model("", "gigapath_slide_enc12l384d", 384, recipe="trident", depth=2)
        >>> model(torch.randn(20, 384), torch.randint(20, (20, 2)) * 256)[0].shape
        torch.Size([1, 384])
    """
    chosen = None if recipe is None else recipe_called(recipe)
    if chosen is not None:
        if global_pool is not None and global_pool != chosen.global_pool:
            raise ValueError(
                f"global_pool is {global_pool} and recipe {recipe!r}, which has "
                f"{chosen.global_pool}; give one of the two."
            )
        global_pool = chosen.global_pool
    config = config_of(model_arch, in_chans=in_chans, global_pool=global_pool or False, **options)
    checkpoint = None
    if pretrained:
        checkpoint = read_checkpoint(_file_of(pretrained, local_dir), sha256=sha256)
    elif sha256 is not None:
        raise ValueError("sha256 is given without a file; name the file with pretrained.")
    model = DropInSlideEncoder(
        config,
        recipe=chosen,
        warns_of_class_token=checkpoint is not None and not tuned,
        device=device,
        dtype=dtype or torch.float32,
    )
    if checkpoint is not None:
        load_slide_weights(model, checkpoint)
    model.mark_untuned()
    return model.eval()


def _file_of(
    pretrained: str | os.PathLike[str], local_dir: str | os.PathLike[str] | None
) -> str | os.PathLike[str]:
    """The file on this machine, downloaded if it is on the hub."""
    if not isinstance(pretrained, str) or not pretrained.startswith(_HUB):
        return pretrained
    name, _, revision = pretrained.removeprefix(_HUB).partition("@")
    try:
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{pretrained!r} needs the package huggingface_hub: pip install huggingface_hub, or "
            f"download {_HUB_FILE} and give its path.",
            name=error.name,
        ) from error
    # Every repository's file has the same name: without a folder each, one replaces the other.
    folder = None if local_dir is None else Path(local_dir) / name.replace("/", "--")
    return hf_hub_download(name, filename=_HUB_FILE, revision=revision or None, local_dir=folder)
