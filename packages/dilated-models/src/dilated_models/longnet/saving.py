"""Models on disk: `model.safetensors` and `config.json`, each written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from dilated_core.atomic_write import write_atomically
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from dilated_models.config import LongNetConfig
from dilated_models.longnet.language_model import LongNetLM
from dilated_models.longnet.size import count_parameters
from dilated_models.longnet.stacks import LongNetStacks, check_has_weights
from dilated_models.text.vocabulary import ByteVocabulary, TokenizerVocabulary, Vocabulary

Model = TypeVar("Model", bound=LongNetStacks)

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
MODEL_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"


def write_config(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `config.json`: the format version, then `content`, then its checksum."""
    whole = {"format_version": FORMAT_VERSION, **content}
    text = json.dumps(whole | {"checksum": _config_checksum(whole)}, indent=2) + "\n"
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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def is_edited(content: Mapping[str, Any]) -> bool:
    """Whether what `read_config` found is another content than `write_config` wrote."""
    rest = {name: value for name, value in content.items() if name != "checksum"}
    return content.get("checksum", written := _config_checksum(rest)) != written


def _config_checksum(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True)  # another order of names is no other content
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def save_model(folder: Path, model: LongNetStacks, *, run_id: str = "") -> None:
    """Write `model.safetensors`; a shared weight is stored once, as the embedding's.

    Args:
        folder: Exists.
        model: The model.
        run_id: Identity of the run that trained the model, if it has one.

    Raises:
        ValueError: If the model is on the meta device.
    """
    check_has_weights(model)
    save_weights(folder, model.config, model.state_dict(), run_id=run_id)


def save_weights(
    folder: Path, config: LongNetConfig, weights: Mapping[str, Tensor], *, run_id: str = ""
) -> None:
    """Write `model.safetensors` from the state dict of a model; the rest as `save_model`."""
    state = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    if config.tie_embeddings:
        del state["output.weight"]
    metadata = {"format": "pt", "run_id": run_id, "checksum": _weights_checksum(state)}
    with write_atomically(folder / MODEL_FILE) as part:
        # save_file writes to a path of its own and hides the error number of a full disk.
        part.write_bytes(save(state, metadata))


def load_model(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> LongNetLM:
    """Build the model of a folder and load all of its weights.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        device: Of the parameters.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged or of another run, or the weights do not fit the
            configuration.
    """
    folder = Path(folder)
    config = _model_config(folder)
    return load_weights(folder, config, lambda: LongNetLM(config, device=device)).eval()


def load_weights(folder: Path, config: LongNetConfig, make: Callable[[], Model]) -> Model:
    """Read the weights of a folder into a new model.

    Args:
        folder: Holds `config.json` and `model.safetensors`.
        config: Of the model.
        make: Makes the model, once the weights are known to be its.

    Raises:
        FileNotFoundError, ValueError: As `load_model`.
    """
    run_id, path = read_config(folder).get("run_id", ""), folder / MODEL_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {MODEL_FILE} yet; train until the first checkpoint is saved."
        )
    # Read, not mapped: if a mapped file is cut short, the process is killed. And safetensors opens
    # no path that is not UTF-8.
    content = path.read_bytes()
    num_parameters = count_parameters(config).total
    if num_parameters > len(content):  # a parameter takes at least one byte
        raise ValueError(
            f"{str(path)!r} does not hold this model's weights: the model of {CONFIG_FILE} has "
            f"{num_parameters} parameters and the file {len(content)} bytes; put back the two "
            f"files of one run."
        )
    try:
        weights = load(content)
        _check_weights_file(path, _metadata(content), weights, run_id)
        model = make()
        model.load_state_dict(weights)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} does not hold this model's weights: {reason}") from error
    return model


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file, which `load` has found whole."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {})


def _check_weights_file(
    path: Path, metadata: Mapping[str, str], weights: Mapping[str, Tensor], run_id: str
) -> None:
    """Compare checksum and run; files that other programs wrote have neither."""
    if metadata.get("checksum", written := _weights_checksum(weights)) != written:
        raise ValueError(
            f"{str(path)!r} is damaged: its checksum is wrong, so the bytes are not those that "
            f"were saved; put back a copy, or save it again with dilated train --resume."
        )
    if metadata.get("run_id", run_id) != run_id:
        raise ValueError(
            f"{str(path)!r} belongs to another run than its folder; put back the folder's own file."
        )


def _weights_checksum(weights: Mapping[str, Tensor]) -> str:
    return checksum(sorted(weights.items()))  # a file does not keep the order


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
    content = read_config(folder)
    if (kind := content.get("architecture", "LongNetLM")) != "LongNetLM":
        raise ValueError(
            f"{str(folder)!r} holds a {kind}, which is no language model; load it with "
            f"dilated_models.{kind}.load."
        )
    try:
        return LongNetConfig.from_dict(content["model"])
    except TypeError as error:
        raise ValueError(f"{str(folder / CONFIG_FILE)!r}: {error}") from error
