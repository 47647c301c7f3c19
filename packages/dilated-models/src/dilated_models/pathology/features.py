"""Feature files of slides: tile embeddings with coordinates, as TRIDENT, CLAM and others write."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

SUFFIXES = (".h5", ".hdf5", ".npz")


@dataclass(frozen=True)
class SlideFeatures:
    """The tiles of a slide, in the order of the file.

    Attributes:
        name: Of the slide: the file's name without its suffix.
        features: float32 `(L, C)`, tile embeddings.
        coords: int64 `(L, 2)`, pixels (x, y) of each tile's upper left corner.
        attributes: What the file tells about coordinates, such as `patch_size_level0`.
    """

    name: str
    features: NDArray[np.float32]
    coords: NDArray[np.int64]
    attributes: Mapping[str, Any]

    def number(self, name: str) -> float | None:
        """An attribute that is a positive number, or None."""
        try:
            value = float(self.attributes[name])
        except (KeyError, TypeError, ValueError):
            return None
        return value if value > 0 and np.isfinite(value) else None

    @property
    def level0_tile(self) -> int | None:
        """Side of a tile in pixels of level 0, if the file tells it."""
        side = self.number("patch_size_level0")
        if side is None and "patch_size" in self.attributes and "downsample" in self.attributes:
            # CLAM: the size on the level that was read, and its (x, y) factors to level 0.
            factor = float(np.ravel(self.attributes["downsample"])[0])
            side = float(self.attributes["patch_size"]) * factor
        return None if side is None else round(side)

    @property
    def scale(self) -> float | None:
        """Factor from pixels of level 0 to those of the tiles' level, if the file tells it."""
        size, level0 = self.number("patch_size"), self.number("patch_size_level0")
        if size is not None and level0 is not None:
            return size / level0
        source, target = self.number("level0_magnification"), self.number("target_magnification")
        return None if source is None or target is None else target / source


def feature_files(paths: Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The feature files among paths of files and folders; those of a folder sorted by name.

    Raises:
        FileNotFoundError: If a path does not exist, or a folder holds none.
        ValueError: If two files have one name, or a file has an unknown suffix.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
            if not inside:
                raise FileNotFoundError(
                    f"the folder {str(path)!r} holds no {', '.join(SUFFIXES)}; it must hold "
                    f"feature files."
                )
            found += inside
        elif not path.is_file():
            raise FileNotFoundError(f"there is no file {str(path)!r}.")
        elif path.suffix.lower() not in SUFFIXES:
            raise ValueError(
                f"the file is {str(path)!r}; it must end with {', '.join(SUFFIXES)}. A .pt file of "
                f"CLAM has no coordinates, so give the .h5 file beside it."
            )
        else:
            found.append(path)
    by_name: dict[str, Path] = {}
    for path in found:
        other = by_name.setdefault(path.stem, path)
        if other != path:
            raise ValueError(
                f"{str(other)!r} and {str(path)!r} have one name, which must tell slides apart; "
                f"give them to two runs."
            )
    return list(by_name.values())


def read_features(path: str | os.PathLike[str]) -> SlideFeatures:
    """Read a feature file.

    A `.h5` file has the datasets `features` `(L, C)` and `coords` `(L, 2)`, with attributes on
    `coords` or on the file; a `.npz` file has arrays with these names. A leading dimension of 1 is
    removed. Coordinates that are floating are rounded, as TRIDENT does.

    Raises:
        FileNotFoundError: If there is no such file.
        ModuleNotFoundError: If it is an h5 file and h5py is not installed (extra `slides`).
        ValueError: If the file is damaged, lacks an array, or its arrays do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}.")
    read = _read_npz if path.suffix.lower() == ".npz" else _read_h5
    try:
        features, coords, attributes = read(path)
    except (OSError, KeyError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())
        raise ValueError(f"{str(path)!r} is no feature file that can be read: {reason}") from error
    features, coords = _without_batch(features, 3), _without_batch(coords, 3)
    _check(path, features, coords)
    return SlideFeatures(
        path.stem,
        np.ascontiguousarray(features, dtype=np.float32),
        np.rint(coords).astype(np.int64),
        attributes,
    )


_Arrays = tuple[NDArray[Any], NDArray[Any], Mapping[str, Any]]


def _read_npz(path: Path) -> _Arrays:
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("it is no archive of arrays")
    with np.load(path, allow_pickle=False) as file:
        names = set(file.files)
        _check_names(path, names)
        attributes = {name: file[name].item() for name in names if file[name].ndim == 0}
        return file["features"], file["coords"], attributes


def _read_h5(path: Path) -> _Arrays:
    import h5py

    with h5py.File(path, "r") as opened:
        file = cast(Any, opened)
        _check_names(path, set(file.keys()))
        attributes = {**dict(file.attrs), **dict(file["coords"].attrs)}
        return file["features"][()], file["coords"][()], attributes


def _check_names(path: Path, names: set[str]) -> None:
    missing = {"features", "coords"} - names
    if missing:
        raise ValueError(
            f"{str(path)!r} has {', '.join(sorted(names)) or 'nothing'} and lacks "
            f"{' and '.join(sorted(missing))}; a feature file must have features and coords."
        )


def _without_batch(array: NDArray[Any], dims: int) -> NDArray[Any]:
    return array[0] if array.ndim == dims and array.shape[0] == 1 else array


def _check(path: Path, features: NDArray[Any], coords: NDArray[Any]) -> None:
    if features.ndim != 2 or coords.shape != (len(features), 2):
        raise ValueError(
            f"{str(path)!r} has features of shape {features.shape} and coords of shape "
            f"{coords.shape}; they must be (L, C) and (L, 2)."
        )
    if not len(features):
        raise ValueError(f"{str(path)!r} has no tile; a slide must have at least one.")
    for name, array in (("features", features), ("coords", coords)):
        if array.dtype.kind not in ("f" if name == "features" else "iuf"):
            raise ValueError(
                f"{str(path)!r} has {name} of dtype {array.dtype}; they must be numbers."
            )
        bad = int((~np.isfinite(array)).any(axis=1).sum())
        if bad:
            raise ValueError(
                f"{str(path)!r} has {bad} of {len(array)} tiles whose {name} are not finite; every "
                f"number must be finite, so extract these tiles again or leave them out."
            )
