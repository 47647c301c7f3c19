"""Which files are the text, and which of their bytes train or validate."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# With fewer files a split by file would be too coarse, so every file is cut in two instead.
_FEWEST_FILES_TO_SPLIT = 20
_SNIFFED_BYTES = 8192
# A folder that holds both is a saved model, perhaps of the run that reads this text.
_FILES_OF_MODELS = {"config.json", "model.safetensors"}


class Piece(NamedTuple):
    """A run of bytes of one file.

    Attributes:
        path: The file.
        name: Path relative to the given folder, with `/`. The split depends on it.
        start: First byte.
        stop: One past the last byte.
    """

    path: Path
    name: str
    start: int
    stop: int

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return self.stop - self.start


class Split(NamedTuple):
    """Training and validation text.

    Attributes:
        train: Pieces to train on.
        validation: Pieces to validate on; no byte is in both.
        skipped: Number of files in the given folders that were skipped as binary.
    """

    train: list[Piece]
    validation: list[Piece]
    skipped: int

    def fingerprint(self) -> str:
        """16 hexadecimal digits that change with a name, a byte or the side of a file.

        Reads all files: a second for a gigabyte.

        Raises:
            OSError: If a file cannot be read.
        """
        digest = hashlib.sha256()
        contents: dict[Path, bytes] = {}
        for side in (self.train, self.validation):
            for piece in side:
                if piece.path not in contents:
                    with piece.path.open("rb") as file:
                        contents[piece.path] = hashlib.file_digest(file, "sha256").digest()
                name = piece.name.encode("utf-8", "surrogateescape")
                digest.update(name + f"\0{piece.start}\0{piece.stop}\0".encode())
                digest.update(contents[piece.path])
            digest.update(b"\n")
        return digest.hexdigest()[:16]


def standard_library_files() -> tuple[list[Piece], int]:
    """The Python standard library's own source files, in the order of their names.

    Raises:
        ValueError: If this Python has no source files on disk.
    """
    root = Path(sysconfig.get_path("stdlib"))
    pieces = [
        piece
        for piece in _walk(root, pruned={"site-packages", "dist-packages", "__pycache__"})
        if piece.name.endswith(".py") and piece.num_bytes
    ]
    if not pieces:
        raise ValueError(
            f"this Python has no source files under {root}; name some text with --text PATH."
        )
    return sorted(pieces, key=lambda piece: piece.name), 0


def text_files(paths: Sequence[Path]) -> tuple[list[Piece], int]:
    """Every file named, and every text file in every folder named, in the order of their names.

    A named file is taken as it is. In a folder, hidden files and folders are skipped, and so are
    folders inside it that hold a model: a run may lie in the folder of its text, and its own files
    must not become text when it is resumed. Files with a zero byte among their first 8192 are taken
    for binary: they are skipped and counted.

    Args:
        paths: Files and folders.

    Returns:
        The non-empty files, and the number of files skipped as binary.

    Raises:
        FileNotFoundError: If a path does not exist.
        ValueError: If a path is a pipe or a device, or nothing is left.
    """
    found: dict[Path, Piece] = {}
    skipped = 0
    for path in paths:
        if path.is_dir():
            for piece in _walk(path, pruned={"__pycache__"}):
                if piece.num_bytes == 0 or any(p.startswith(".") for p in piece.name.split("/")):
                    continue
                if _has_zero_byte(piece.path):
                    skipped += 1
                else:
                    found.setdefault(piece.path.resolve(), piece)
        elif path.is_file():
            size = path.stat().st_size
            if size:
                found.setdefault(path.resolve(), Piece(path, path.name, 0, size))
        elif path.exists():
            raise ValueError(
                f"{str(path)!r} is a pipe, a device or a socket; a text must be a file or a folder "
                f"of files, because it is read many times, so write it to a file first."
            )
        else:
            raise FileNotFoundError(f"there is no file or folder {str(path)!r}; correct the path.")
    if not found:
        named = ", ".join(repr(str(path)) for path in paths)
        raise ValueError(
            f"there is no text in {named}, only empty or binary files; name a folder that has some."
        )
    return sorted(found.values(), key=lambda piece: (piece.name, str(piece.path))), skipped


def split_files(pieces: Iterable[Piece], skipped: int, *, validation_share: float) -> Split:
    """Hold out part of the text for validation, as a pure function of names and sizes.

    With 20 files or more, a file is for validation if the SHA-256 of its name, read as a fraction,
    is below the share. So adding a file moves no other file. With fewer than 20 files, the end of
    every file is for validation.

    Args:
        pieces: Whole files.
        skipped: As in `Split`.
        validation_share: In (0, 1).
    """
    pieces = list(pieces)
    if len(pieces) < _FEWEST_FILES_TO_SPLIT:
        cuts = [piece.stop - int(piece.stop * validation_share) for piece in pieces]
        heads = [piece._replace(stop=cut) for piece, cut in zip(pieces, cuts, strict=True)]
        tails = [piece._replace(start=cut) for piece, cut in zip(pieces, cuts, strict=True)]
        return Split(
            [piece for piece in heads if piece.num_bytes],
            [piece for piece in tails if piece.num_bytes],
            skipped,
        )
    drawn = [_fraction(piece.name) for piece in pieces]
    # At least one file on each side, whatever the draw.
    limit = min(max(validation_share, min(drawn)), sorted(drawn)[-2])
    train = [piece for piece, x in zip(pieces, drawn, strict=True) if x > limit]
    validation = [piece for piece, x in zip(pieces, drawn, strict=True) if x <= limit]
    return Split(train, validation, skipped)


def _fraction(name: str) -> float:
    """A number in [0, 1) that only depends on the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / (
        1 << 48
    )


def _walk(root: Path, *, pruned: set[str]) -> Iterator[Piece]:
    """Regular files under `root`, but for models in folders of it.

    Folders that are symbolic links are not entered.
    """
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        if _FILES_OF_MODELS.issubset(names) and Path(folder) != root:
            subfolders.clear()
            continue
        subfolders[:] = sorted(set(subfolders) - pruned)
        for name in sorted(names):
            path = Path(folder, name)
            if path.is_file():
                relative = path.relative_to(root).as_posix()
                yield Piece(path, relative, 0, path.stat().st_size)


def _raise(error: OSError) -> None:
    """Refuse a folder that cannot be listed: os.walk alone would leave it out in silence."""
    raise error


def _has_zero_byte(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_SNIFFED_BYTES)
