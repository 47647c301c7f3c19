"""Embeddings on disk: a file for each slide, written whole, and one table of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from dilated_core.atomic_write import write_atomically
from numpy.typing import NDArray

_SETTINGS_FILE = "encode.json"
_TABLE_FILE = "embeddings.npz"


class EmbeddingStore:
    """A folder with a file `NAME.h5` for each slide.

    `features` in it is the embedding `(E,)`, as in TRIDENT's files of slide features; attributes of
    `features` tell how it was made. `tile_features` `(L, E)` and `attention` `(L,)` are there on
    request, in the order of `coords` `(L, 2)`, which is that of the feature file.

    Args:
        folder: Made if it does not exist.
        settings: What the embeddings depend on beside the slides. A folder holds embeddings of one
            kind.

    Raises:
        ValueError: If the folder holds embeddings with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._settings = dict(settings)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _SETTINGS_FILE
        if not path.exists():
            with write_atomically(path) as part:
                part.write_text(json.dumps(self._settings, indent=2) + "\n", "utf-8")
            return
        try:
            before: Any = json.loads(path.read_text("utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} is damaged: {error}") from error
        differing = [
            name
            for name in sorted({*before, *self._settings})
            if before.get(name) != self._settings.get(name)
        ]
        if differing:
            name = differing[0]
            raise ValueError(
                f"{str(folder)!r} holds embeddings with {name} {before.get(name)!r}, and this run "
                f"has {self._settings.get(name)!r}; a folder must hold one kind, so name another "
                f"folder."
            )

    def path_of(self, name: str) -> Path:
        """The file of a slide."""
        return self.folder / f"{name}.h5"

    def has(self, source: Path) -> bool:
        """Whether the embedding of this feature file is there, and the file has not changed."""
        import h5py

        path = self.path_of(source.stem)
        if not path.is_file():
            return False
        try:
            with h5py.File(path, "r") as opened:
                attributes = dict(cast(Any, opened)["features"].attrs)
        except (OSError, KeyError):
            return False
        return all(attributes.get(name) == value for name, value in _state_of(source).items())

    def write(
        self,
        source: Path,
        embedding: NDArray[np.float32],
        attributes: Mapping[str, Any],
        tiles: Mapping[str, NDArray[Any]],
    ) -> None:
        """Write the file of a slide, whole or not at all.

        Args:
            source: The feature file.
            embedding: `(E,)`.
            attributes: More about the embedding.
            tiles: Arrays `(L, …)` by name.
        """
        import h5py

        with write_atomically(self.path_of(source.stem)) as part, h5py.File(part, "w") as opened:
            file = cast(Any, opened)
            features = file.create_dataset("features", data=embedding)
            for name, array in tiles.items():
                file.create_dataset(name, data=array)
            known = {name: value for name, value in self._settings.items() if value is not None}
            for name, value in {**known, **attributes, **_state_of(source)}.items():
                features.attrs[name] = value

    def write_table(self, names: Sequence[str]) -> Path:
        """Write `embeddings.npz`: `names` `(N,)` and `embeddings` `(N, E)` of these slides."""
        import h5py

        rows: list[NDArray[np.float32]] = []
        for name in names:
            with h5py.File(self.path_of(name), "r") as opened:
                rows.append(cast(Any, opened)["features"][()])
        path = self.folder / _TABLE_FILE
        with write_atomically(path) as part, part.open("wb") as file:
            np.savez(file, names=np.array(names, dtype=np.str_), embeddings=np.stack(rows))
        return path


def _state_of(source: Path) -> dict[str, int]:
    """What tells that a feature file is still the one that was read."""
    state = source.stat()
    return {"source_bytes": state.st_size, "source_mtime_ns": state.st_mtime_ns}
