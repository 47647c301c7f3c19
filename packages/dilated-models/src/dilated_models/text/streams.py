"""Long sequences of tokens that stay on disk: the bytes of many files, or a cache of tokens.

A stream is documents end to end. A document is a file, or the part of a file that is in the split.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dilated_models.text.files import Piece

Int64Array = npt.NDArray[np.int64]

_SUMMED_TOKENS = 1 << 20  # at a time, which bounds the memory


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

    def document_starts(self, start: int, stop: int) -> Int64Array:
        """Which of these tokens are the first of a document, in order; 0 is one."""
        ...

    def text_of(self, start: int, stop: int) -> bytes:
        """The bytes these tokens stand for."""
        ...

    def place_of(self, position: int) -> tuple[Path, int]:
        """The file of a token, and its first byte in there."""
        ...


class ByteStream:
    """The bytes of many files end to end, read when they are needed.

    A file is open only while it is read, so a folder of any size can be read. It is not
    memory-mapped: if a mapped file is cut short, the next access kills the process with SIGBUS.

    Args:
        pieces: What to concatenate, in order; none may be empty.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self._ends = list(itertools.accumulate(piece.num_bytes for piece in pieces))
        self._starts = np.array([0, *self._ends[:-1]], dtype=np.int64)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> Int64Array:
        """Bytes as numbers 0 … 255, `(stop − start,)`."""
        return np.frombuffer(self.text_of(start, stop), dtype=np.uint8).astype(np.int64)

    def byte_lengths(self, start: int, stop: int) -> Int64Array:
        """Ones: a token is a byte."""
        return np.ones(stop - start, dtype=np.int64)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        """First bytes of pieces among `start` … `stop − 1`."""
        return _within(self._starts, start, stop)

    def text_of(self, start: int, stop: int) -> bytes:
        """Bytes `start` … `stop − 1`, which must lie inside the stream.

        Raises:
            IndexError: If they do not.
            OSError: If a file was removed or has become shorter.
        """
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
            parts.append(_read_exactly(piece.path, here, taken))
            start += taken
            index += 1
        return b"".join(parts)

    def place_of(self, position: int) -> tuple[Path, int]:
        """The file that holds a byte of the stream, and where in it.

        Raises:
            IndexError: If the stream has no such byte.
        """
        if not 0 <= position < len(self):
            raise IndexError(
                f"position is {position}; it must be at least 0 and below the {len(self)} bytes of "
                f"the text."
            )
        index = bisect.bisect_right(self._ends, position)
        piece = self._pieces[index]
        return piece.path, piece.stop - (self._ends[index] - position)


class TokenFile:
    """Tokens, their byte lengths and the starts of documents in files, and the text they stand for.

    Args:
        tokens: Path of the token ids.
        token_dtype: Of the ids in that file.
        byte_lengths: Path of as many uint32: the number of bytes that each token stands for.
        document_starts: Path of int64: the first token of each document that has one.
        text: The bytes that were tokenised.

    Raises:
        OSError: If a file is missing, or the two hold different numbers of tokens.
    """

    def __init__(
        self,
        tokens: Path,
        token_dtype: np.dtype[np.unsignedinteger[Any]],
        byte_lengths: Path,
        document_starts: Path,
        text: ByteStream,
    ) -> None:
        self._tokens = _NumberFile(tokens, token_dtype)
        self._byte_lengths = _NumberFile(byte_lengths, np.dtype(np.uint32))
        self._starts = np.fromfile(document_starts, dtype=np.int64)
        self._text = text
        if len(self._tokens) != len(self._byte_lengths):
            raise OSError(
                f"{str(tokens)!r} has {len(self._tokens)} tokens and {str(byte_lengths)!r} "
                f"{len(self._byte_lengths)}; they must have as many, so remove both, and the text "
                f"is tokenised again."
            )

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Int64Array:
        """Token ids, `(stop − start,)`."""
        return self._tokens.read(start, stop)

    def byte_lengths(self, start: int, stop: int) -> Int64Array:
        """Bytes per token, `(stop − start,)`; over the whole file they add up to the text."""
        return self._byte_lengths.read(start, stop)

    def document_starts(self, start: int, stop: int) -> Int64Array:
        """First tokens of documents among `start` … `stop − 1`."""
        return _within(self._starts, start, stop)

    def place_of(self, position: int) -> tuple[Path, int]:
        """The file of a token, and its first byte in there; exact where the text is UTF-8."""
        return self._text.place_of(min(self._bytes_before(position), len(self._text) - 1))

    def _bytes_before(self, position: int) -> int:
        return sum(
            int(self._byte_lengths.read(first, min(first + _SUMMED_TOKENS, position)).sum())
            for first in range(0, position, _SUMMED_TOKENS)
        )

    def text_of(self, start: int, stop: int) -> bytes:
        """The bytes these tokens stand for; exact where the text is UTF-8."""
        before = self._bytes_before(start)
        after = before + int(self._byte_lengths.read(start, stop).sum())
        return self._text.text_of(min(before, len(self._text)), min(after, len(self._text)))


class _NumberFile:
    """A file of unsigned integers, read in parts."""

    def __init__(self, path: Path, dtype: np.dtype[np.unsignedinteger[Any]]) -> None:
        self._path = path
        self._dtype = dtype
        self._length = path.stat().st_size // dtype.itemsize

    def __len__(self) -> int:
        return self._length

    def read(self, start: int, stop: int) -> Int64Array:
        size = self._dtype.itemsize
        stop = min(stop, self._length)
        content = _read_exactly(self._path, start * size, max(0, stop - start) * size)
        return np.frombuffer(content, dtype=self._dtype).astype(np.int64)


def _read_exactly(path: Path, start: int, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise OSError(
            f"{str(path)!r} has become shorter since it was opened; put it back as it was, and "
            f"leave the text unchanged while it is read."
        )
    return content


def _within(ascending: Int64Array, start: int, stop: int) -> Int64Array:
    """The numbers in [start, stop)."""
    first, after = np.searchsorted(ascending, (start, stop))
    return ascending[first:after]
