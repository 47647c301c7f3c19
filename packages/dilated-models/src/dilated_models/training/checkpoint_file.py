"""The checkpoint of a run on one process: a file with a checksum and the identity of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dilated_core.atomic_write import write_atomically

from dilated_models.longnet.saving import checksum

CHECKPOINT_FILE = "checkpoint.pt"
CHECKPOINT_FORMAT = 2


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write the content with its checksum, whole or not at all.

    Raises:
        OSError: If the disk is full.
    """
    content = content | {"checksum": checksum(content)}
    with write_atomically(path) as part, part.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # of a full disk, which PyTorch hides
                raise error.__context__ from None
            raise


def read_checkpoint(path: Path, run_id: str) -> dict[str, Any]:
    """The content of a checkpoint, once its checksum and its run are found right."""
    with path.open("rb"):  # an OSError of opening it is none of its content
        pass
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
        version, written = content["format_version"], content.pop("checksum", None)
    except Exception as error:  # a damaged file makes the unpickler raise nearly any type
        raise ValueError(
            f"{str(path)!r} cannot be resumed from: it is damaged, or no checkpoint of a run "
            f"({type(error).__name__}); put back a copy, or start again in another folder."
        ) from error
    if version != CHECKPOINT_FORMAT:
        raise ValueError(
            f"{str(path)!r} cannot be resumed from: its format is {version!r}; it must be "
            f"{CHECKPOINT_FORMAT}, so use the version of dilated-models that wrote it."
        )
    if checksum(content) != written:
        raise ValueError(
            f"{str(path)!r} is damaged: its checksum is wrong, so the bytes are not those that "
            f"were saved; put back a copy, or start again in another folder."
        )
    if content["run_id"] != run_id:
        raise ValueError(
            f"{str(path)!r} belongs to another run than its folder; put back the folder's own "
            f"checkpoint, or start again in another folder."
        )
    return content
