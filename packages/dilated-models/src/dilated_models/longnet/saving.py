"""Models on disk: `model.safetensors` and `config.json`, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from dilated_core.atomic_write import write_atomically
from safetensors import SafetensorError
from safetensors.torch import (
    load_file,  # pyright: ignore[reportUnknownVariableType]
    save_file,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from dilated_models.config import LongNetConfig
from dilated_models.longnet.language_model import LongNetLM, check_weights
from dilated_models.text.vocabulary import ByteVocabulary, TokenizerVocabulary, Vocabulary

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `config.json`: the format version, then `content`."""
    text = json.dumps({"format_version": FORMAT_VERSION, **content}, indent=2) + "\n"
    with write_atomically(folder / CONFIG_FILE) as part:
        part.write_text(text, "utf-8")


def read_config(folder: Path) -> dict[str, Any]:
    """Read what `write_config` wrote.

    Raises:
        FileNotFoundError: If the folder or the file is missing.
        ValueError: If the file is not such a configuration.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {CONFIG_FILE}; it must be the --out folder of a training run, "
            f"so name such a folder."
        )
    try:
        content: Any = json.loads(path.read_text("utf-8"))
        version = content["format_version"]
        model, tokenizer = content["model"], content["tokenizer"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{str(path)!r} was not written by dilated train ({type(error).__name__}: {error})."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{str(path)!r} has format {version!r}; it must have format {FORMAT_VERSION} for this "
            f"version of dilated-models, so use the version that wrote it."
        )
    if not isinstance(model, dict) or not isinstance(tokenizer, str):
        raise ValueError(f"{str(path)!r} was not written by dilated train.")
    return content


def save_model(folder: Path, model: LongNetLM) -> None:
    """Write `model.safetensors`; a shared weight is stored once, as the embedding's.

    Raises:
        ValueError: If the model is on the meta device.
    """
    check_weights(model)
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del state["output.weight"]
    with write_atomically(folder / MODEL_FILE) as part:
        save_file(state, part, metadata={"format": "pt"})


def load_model(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LongNetLM:
    """Build the model of a folder and load all of its weights.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        device: Of the parameters.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the weights do not fit the configuration.
    """
    folder = Path(folder)
    config = _model_config(folder)
    path = folder / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {MODEL_FILE} yet; train until the first checkpoint is saved."
        )
    model = LongNetLM(config, device=device)
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} does not hold this model's weights: {reason}") from error
    return model.eval()


def checksum(content: object) -> str:
    """SHA-256 over tensors and plain values in dicts, lists and tuples, as hexadecimal digits.

    A file's own reader does not find a flipped bit in a tensor; comparing this number does.
    """
    digest = hashlib.sha256()
    for part in _parts(content):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}\n".encode()
        flat = value.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().tobytes()  # pyright: ignore[reportUnknownMemberType]
    elif isinstance(value, dict):
        yield from _parts(list(cast("dict[object, object]", value).items()))
    elif isinstance(value, list | tuple):
        items = cast("Sequence[object]", value)
        yield f"{len(items)} items\n".encode()
        for item in items:
            yield from _parts(item)
    else:
        yield f"{value!r}\n".encode()


def load_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary of the model in a folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or the tokenizer has more tokens than the model.
    """
    name = read_config(folder)["tokenizer"]
    vocabulary = (
        ByteVocabulary() if name == "bytes" else TokenizerVocabulary(folder / TOKENIZER_FILE)
    )
    num_tokens = _model_config(folder).num_tokens
    if vocabulary.num_tokens > num_tokens:
        raise ValueError(
            f"the tokenizer in {str(folder)!r} has {vocabulary.num_tokens} tokens and the model "
            f"{num_tokens}; it must have no more than the model, so put back the tokenizer of the "
            f"training run."
        )
    return vocabulary


def _model_config(folder: Path) -> LongNetConfig:
    try:
        return LongNetConfig.from_dict(read_config(folder)["model"])
    except TypeError as error:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r}: {error}") from error
