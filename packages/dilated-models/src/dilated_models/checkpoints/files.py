"""Files of weights: `.pth` and safetensors, with their SHA-256."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

Weights = Mapping[str, Tensor] | str | os.PathLike[str]
"""What loaders take: a state dict, or the path of a file."""

_SHA256_DIGITS = 64


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file.

    Attributes:
        weights: By their names in the file.
        sha256: Of the file, as hexadecimal digits; None for a state dict that came from no file.
        metadata: Of a safetensors file; empty for others.
    """

    weights: Mapping[str, Tensor]
    sha256: str | None = None
    metadata: Mapping[str, str] | None = None


def read_checkpoint(
    weights: Weights, *, keys: Sequence[str] = ("model",), sha256: str | None = None
) -> Checkpoint:
    """Read the weights of a file, or take a state dict as it is.

    A file that begins as a safetensors file does is read as one, and any other by
    `torch.load(weights_only=True)`, whatever its name. No code in a file is run.

    Args:
        weights: A state dict, or the path of a file.
        keys: Under which of these keys a file may hold the state dict, instead of being one.
        sha256: The digest that the file must have; None: any.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an entry is no tensor.
        ValueError: If the file is no file of weights, is damaged, or has another digest.

    Example:
        >>> read_checkpoint({"model": {"w": torch.ones(1)}}).weights
        {'w': tensor([1.])}
    """
    if isinstance(weights, Mapping):
        if sha256 is not None:
            raise ValueError(
                "sha256 is given with a state dict, which has no digest; give the path of its file."
            )
        return Checkpoint(_state_dict(weights, keys, "the state dict"))
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}; the weights must be a file on this machine, so "
            f"download it first. No weights are drawn at random instead."
        )
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    _check_digest(path, digest, sha256)
    name = f"the file {str(path)!r}"
    if _is_safetensors(content):
        try:
            loaded, metadata = load(content), _metadata(content)
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{name} is a damaged safetensors file: {error}") from error
        return Checkpoint(_state_dict(loaded, keys, name), digest, metadata)
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n", 1)[0]
        raise ValueError(
            f"{name} holds no weights that can be read without running its code: {reason} It must "
            f"be a safetensors file, or one that torch.save wrote of tensors and plain values."
        ) from error
    return Checkpoint(_state_dict(loaded, keys, name), digest, {})


def _check_digest(path: Path, digest: str, expected: str | None) -> None:
    if expected is None:
        return
    if len(expected) != _SHA256_DIGITS or set(expected.lower()) - set("0123456789abcdef"):
        raise ValueError(f"sha256 is {expected!r}; it must be {_SHA256_DIGITS} hexadecimal digits.")
    if digest != expected.lower():
        raise ValueError(
            f"the file {str(path)!r} has the SHA-256 {digest}; it must have {expected.lower()}, so "
            f"download it again, or pin the digest of this file."
        )


def _is_safetensors(content: bytes) -> bool:
    """Whether the file begins with the length of a JSON header and the header."""
    header = int.from_bytes(content[:8], "little")
    return len(content) > 8 and content[8:9] == b"{" and header <= len(content) - 8


def _metadata(content: bytes) -> dict[str, str]:
    import json

    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header.get("__metadata__", {})


def _state_dict(loaded: object, keys: Sequence[str], name: str) -> dict[str, Tensor]:
    """The state dict in what was loaded: itself, or under one of the keys."""
    if not isinstance(loaded, Mapping):
        raise TypeError(
            f"{name} holds a {type(loaded).__name__}; it must hold a state dict: names and tensors."
        )
    found = cast("Mapping[Any, Any]", loaded)
    for key in keys:
        if isinstance(found.get(key), Mapping):
            found = cast("Mapping[Any, Any]", found[key])
            break
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(
                f"{name} has the entry {key!r} of type {type(value).__name__}; every entry must be "
                f"a tensor with a name{_hint(found, keys)}."
            )
    return dict(found)


def _hint(found: Mapping[Any, Any], keys: Sequence[str]) -> str:
    nested = [repr(key) for key, value in found.items() if isinstance(value, Mapping)]
    if not nested:
        return ""
    return (
        f". The state dict may lie under {', '.join(nested)}, and is looked for under "
        f"{', '.join(map(repr, keys))}"
    )
