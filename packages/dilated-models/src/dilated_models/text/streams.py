"""Long sequences of tokens that stay on disk: the bytes of many files, or a cache of tokens."""

from __future__ import annotations

import bisect
import itertools
import mmap
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dilated_models.text.files import Piece

Int64Array = npt.NDArray[np.int64]

_MOST_OPEN_FILES = 64


class TokenStream(Protocol):
    """A sequence of tokens too long to hold in memory."""

    def __len__(self) -> int:
        """Number of tokens."""
        ...

    def read(self, start: int, stop: int) -> Int64Array:
        """Tokens `start` … `stop − 1`."""
        ...

    def byte_lengths(self, start: int, stop: int) -> Int64Array:
        """How many bytes of text each of these tokens stands for."""
        ...

    def text_of(self, start: int, stop: int) -> bytes:
        """The bytes these tokens stand for."""
        ...


class ByteStream:
    """The bytes of many files end to end, memory-mapped when they are read.

    At most 64 files are mapped at a time, so a folder of any size can be read.

    Args:
        pieces: What to concatenate, in order; none may be empty.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._ends = list(itertools.accumulate(piece.num_bytes for piece in pieces))
        self._mapped: OrderedDict[Path, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Int64Array:
        """Bytes as numbers 0 … 255, `(stop − start,)`."""
        return np.frombuffer(self.text_of(start, stop), dtype=np.uint8).astype(np.int64)

    def byte_lengths(self, start: int, stop: int) -> Int64Array:
        """Ones: a token is a byte."""
        return np.ones(stop - start, dtype=np.int64)

    def text_of(self, start: int, stop: int) -> bytes:
        """Bytes `start` … `stop − 1`, which must lie inside the stream."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(
                f"start is {start} and stop {stop}; they must be in order and within the "
                f"{len(self)} bytes of the text."
            )
        parts: list[bytes] = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            piece = self._pieces[index]
            here = piece.stop - (self._ends[index] - start)  # offset inside the file
            taken = min(stop - start, piece.stop - here)
            part = self._map(piece)[here : here + taken]
            if len(part) != taken:
                raise OSError(
                    f"{piece.path} has become shorter since it was opened; start again, and leave "
                    f"the text unchanged while it is read."
                )
            parts.append(part)
            start += taken
            index += 1
        return b"".join(parts)

    def _map(self, piece: Piece) -> mmap.mmap:
        mapped = self._mapped.get(piece.path)
        if mapped is None:
            with piece.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._mapped[piece.path] = mapped
            if len(self._mapped) > _MOST_OPEN_FILES:
                self._mapped.popitem(last=False)[1].close()
        self._mapped.move_to_end(piece.path)
        return mapped


class TokenFile:
    """Tokens and their byte lengths in two memory-mapped files, and the text they stand for.

    Args:
        tokens: Path of the token ids.
        token_dtype: Of the ids in that file.
        byte_lengths: Path of as many uint32: the number of bytes that each token stands for.
        text: The bytes that were tokenised.
    """

    def __init__(
        self,
        tokens: Path,
        token_dtype: np.dtype[np.unsignedinteger[Any]],
        byte_lengths: Path,
        text: ByteStream,
    ) -> None:
        self._tokens = np.memmap(tokens, dtype=token_dtype, mode="r")
        self._byte_lengths = np.memmap(byte_lengths, dtype=np.uint32, mode="r")
        self._text = text

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Int64Array:
        """Token ids, `(stop − start,)`."""
        return self._tokens[start:stop].astype(np.int64)

    def byte_lengths(self, start: int, stop: int) -> Int64Array:
        """Bytes per token, `(stop − start,)`; over the whole file they add up to the text."""
        return self._byte_lengths[start:stop].astype(np.int64)

    def text_of(self, start: int, stop: int) -> bytes:
        """The bytes these tokens stand for; exact where the text is UTF-8."""
        before = int(self._byte_lengths[:start].sum(dtype=np.int64))
        after = before + int(self._byte_lengths[start:stop].sum(dtype=np.int64))
        return self._text.text_of(min(before, len(self._text)), min(after, len(self._text)))
