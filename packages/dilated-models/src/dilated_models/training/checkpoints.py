"""From what a run continues: one file of one process, or a folder that several have written.

Several processes write with `torch.distributed.checkpoint`: each its share, into one folder that
gets its name when all of it is on the disk. Any number of processes can read either kind.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import secrets
import shutil
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from dilated_core.atomic_write import write_atomically
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import (
    load,  # pyright: ignore[reportUnknownVariableType]
)
from torch.distributed.checkpoint.state_dict_saver import (
    save,  # pyright: ignore[reportUnknownVariableType]
)

from dilated_models.training.checkpoint_file import CHECKPOINT_FILE
from dilated_models.training.loop import TrainingState
from dilated_models.training.ranks import Ranks

_FORMAT = 1
_PREFIX = "checkpoint-"
_MANIFEST = "manifest.json"
# What the index of torch.distributed.checkpoint may name. A pickle could call anything else.
_KNOWN = {
    "builtins": {"set", "frozenset", "complex"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}


def has_checkpoint(folder: Path) -> bool:
    """Whether a run can continue from a folder."""
    return (folder / CHECKPOINT_FILE).exists() or bool(_sharded(folder))


def save_checkpoint(state: TrainingState, folder: Path, *, run_id: str, ranks: Ranks) -> None:
    """Write all that is needed to continue, whole or not at all; then remove what was before.

    All ranks call this. The newest checkpoint stays until the new one is on the disk.

    Args:
        state: To save.
        folder: Of the run.
        run_id: Identity of the run.
        ranks: The processes.

    Raises:
        OSError: On all ranks, if a rank cannot write its share.
    """
    if ranks.size == 1:
        state.save(folder, run_id=run_id)
        kept = None
    else:
        kept = folder / f"{_PREFIX}{state.step:09}"
        if not ranks.of_first(kept.exists()):  # it may: a run that stops where it was resumed
            _save_sharded(state, kept, run_id, ranks)
    if ranks.is_first:
        _remove_but(kept, folder)


def remove_checkpoints(folder: Path) -> None:
    """Remove what a run left that ended before its folder was a run's: no run continues from it."""
    _remove_but(None, folder)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def _remove_but(kept: Path | None, folder: Path) -> None:
    """Remove all checkpoints but one; None: but the file."""
    for old in _sharded(folder):
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)
    if kept is not None:
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def restore_checkpoint(state: TrainingState, folder: Path, *, run_id: str, ranks: Ranks) -> None:
    """Continue from the newest checkpoint, which any number of processes may have written.

    Arguments as of `save_checkpoint`.

    Raises:
        FileNotFoundError: If the folder has no checkpoint.
        ValueError: If the newest one is damaged or belongs to another run or model, or has more
            steps than the run has to do.
    """
    newest = ranks.first(lambda: _newest(folder))
    if newest is None:
        ranks.together(lambda: state.restore(folder, run_id=run_id))
        return
    manifest = ranks.first(lambda: _read_manifest(newest, run_id))
    state.check_steps(manifest["step"])
    ranks.together(lambda: _check_files(newest, manifest["files"], ranks))
    ranks.together(lambda: _load(state, newest, ranks))
    state.step, state.seconds = manifest["step"], manifest["seconds"]
    # Several processes draw dropout from seed, step and rank, so there is no state to restore.
    torch.manual_seed(state.config.seed)


def _sharded(folder: Path) -> list[Path]:
    """Folders of whole checkpoints, the newest last."""
    return sorted(path.parent for path in folder.glob(f"{_PREFIX}*/{_MANIFEST}"))


def _newest(folder: Path) -> Path | None:
    """The folder of the newest checkpoint, or None if that is a file, or there is none."""
    found = _sharded(folder)
    if not found:
        return None
    file = folder / CHECKPOINT_FILE
    if file.exists():  # a process was killed after it wrote the newer one of the two
        with contextlib.suppress(Exception):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if content["step"] > int(found[-1].name.removeprefix(_PREFIX)):
                return None
    return found[-1]


def _save_sharded(state: TrainingState, path: Path, run_id: str, ranks: Ranks) -> None:
    token = ranks.of_first(secrets.token_hex(8))
    part = path.with_name(f".{path.name}.{token}.part")
    try:
        writer = FileSystemWriter(part, sync_files=True)
        with _plain_errors():
            save(_tensors(state), storage_writer=writer)
        files = ranks.first(lambda: sorted(p.name for p in part.iterdir()))
        digests: dict[str, str] = {}
        for found in ranks.gather(ranks.together(lambda: _digests(part, files, ranks))):
            digests |= found
        content = {
            "format_version": _FORMAT,
            "run_id": run_id,
            "step": state.step,
            "seconds": state.seconds,
            "ranks": ranks.size,
            "files": digests,
        }
        ranks.first(lambda: _finish(part, path, content))
    except BaseException:
        if ranks.is_first:
            shutil.rmtree(part, ignore_errors=True)
        raise


def _finish(part: Path, path: Path, content: dict[str, Any]) -> None:
    """Give a folder its name: from here on it is a checkpoint."""
    with write_atomically(part / _MANIFEST) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    part.rename(path)
    if os.name == "posix":  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _digests(folder: Path, files: list[str], ranks: Ranks) -> dict[str, str]:
    """SHA-256 of the files that this rank reads: the ranks share the work."""
    found: dict[str, str] = {}
    for name in files[ranks.rank :: ranks.size]:
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _check_files(path: Path, files: dict[str, str], ranks: Ranks) -> None:
    for name, digest in _digests(path, sorted(files), ranks).items():
        if digest != files[name]:
            raise ValueError(
                f"{str(path / name)!r} is damaged: its checksum is wrong, so the bytes are not "
                f"those that were saved; put back a copy, or start again in another folder."
            )


def _read_manifest(path: Path, run_id: str) -> dict[str, Any]:
    try:
        content: Any = json.loads((path / _MANIFEST).read_text("utf-8"))
        version, owner = content["format_version"], content["run_id"]
        content["step"], content["seconds"], content["files"] = (
            int(content["step"]),
            float(content["seconds"]),
            dict(content["files"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{str(path)!r} cannot be resumed from: its {_MANIFEST} is damaged "
            f"({type(error).__name__}: {error})."
        ) from error
    if version != _FORMAT:
        raise ValueError(
            f"{str(path)!r} cannot be resumed from: its format is {version!r}; it must be "
            f"{_FORMAT}, so use the version of dilated-models that wrote it."
        )
    if owner != run_id:
        raise ValueError(
            f"{str(path)!r} belongs to another run than its folder; put back the folder's own "
            f"checkpoint, or start again in another folder."
        )
    return content


def _tensors(state: TrainingState) -> dict[str, Tensor]:
    """Weights, and what the optimiser keeps of each, by name. A shared weight comes once."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in state.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    return tensors


def _load(state: TrainingState, path: Path, ranks: Ranks) -> None:
    """Read weights and optimiser, of which each rank takes what it holds."""
    reader = _Reader(path)
    try:
        saved = reader.read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, EOFError, AttributeError) as error:
        raise ValueError(f"{str(path)!r} cannot be resumed from: {error}") from error
    parameters = dict(state.model.named_parameters())
    state.optimizer.state.clear()
    for name, parameter in parameters.items():
        for key, size in _kept_of(name, saved):
            is_alike = size == parameter.shape
            state.optimizer.state[parameter][key] = (
                torch.zeros_like(parameter.detach()) if is_alike else torch.zeros(size)
            )
    tensors = _tensors(state)
    sizes = {name: tuple(cast("Any", found).size) for name, found in saved.items()}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != sizes:
        raise ValueError(
            f"{str(path)!r} cannot be resumed from: its weights are not those of the model of the "
            f"run; put back the folder's own checkpoint."
        )
    with _plain_errors():
        load(tensors, storage_reader=reader, no_dist=ranks.size == 1)


def _kept_of(name: str, saved: dict[str, Any]) -> Iterator[tuple[str, torch.Size]]:
    """What was saved of an optimiser for a parameter: its keys and sizes."""
    for found, metadata in saved.items():
        kind, _, rest = found.partition(".")
        key, _, parameter = rest.partition(".")
        if (
            kind == "optimizer"
            and parameter == name
            and isinstance(metadata, TensorStorageMetadata)
        ):
            yield key, metadata.size


class _Reader(FileSystemReader):
    """Reads a checkpoint without running code that its index could name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._index = path / ".metadata"

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self._index.open("rb") as file:
            metadata: Metadata = _Unpickler(file).load()
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        if not is_dtype and global_name not in _KNOWN.get(module_name, ()):
            raise pickle.UnpicklingError(
                f"its index names {module_name}.{global_name}, which no checkpoint does"
            )
        return super().find_class(module_name, global_name)


@contextlib.contextmanager
def _plain_errors() -> Generator[None]:
    """Raise the error of the rank that failed, not PyTorch's collection of them."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failed:  # no Exception, but a BaseException
        causes = {rank: found[0] for rank, found in failed.failures.items()}
        for rank, cause in causes.items():
            if isinstance(cause, OSError):
                cause.add_note(f"on rank {rank}")
                cause.__dict__["told_by"] = rank
                raise cause from None
        raise RuntimeError(
            "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, e in causes.items())
        ) from None
