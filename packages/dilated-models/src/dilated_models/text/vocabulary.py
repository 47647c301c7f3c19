"""Text to tokens and back: bytes, or a tokenizer file."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

import numpy as np
from dilated_core.atomic_write import write_atomically

from dilated_models.text.files import Piece
from dilated_models.text.streams import ByteStream, Int64Array, TokenFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PART_BYTES = 1 << 20


class Vocabulary(Protocol):
    """Converts text to token ids and back."""

    @property
    def num_tokens(self) -> int:
        """Number of different tokens."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD."""
        ...


class ByteVocabulary:
    """The 256 bytes of UTF-8 text.

    Example:
        >>> ByteVocabulary().encode("aé")
        [97, 195, 169]
    """

    num_tokens = 256

    def encode(self, text: str) -> list[int]:
        """UTF-8 bytes. A lone surrogate, which stands for a byte that is no UTF-8, is that byte."""
        return list(text.encode("utf-8", "surrogateescape"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Inverse of `encode` for whole characters."""
        return bytes(tokens).decode("utf-8", "replace")


class TokenizerVocabulary:
    """A tokenizer saved as JSON by the `tokenizers` library (`tokenizer.json`).

    Args:
        path: The file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not a tokenizer.
    """

    def __init__(self, path: Path) -> None:
        # Imported here: tokenizers is part of the extra `cli`, and bytes need none.
        from tokenizers import Tokenizer

        if not path.is_file():
            raise FileNotFoundError(
                f"there is no tokenizer file {str(path)!r}; correct the path, or use bytes."
            )
        self.json_bytes = path.read_bytes()
        try:
            self.tokenizer: Tokenizer = Tokenizer.from_buffer(self.json_bytes)
        except Exception as error:  # the library raises no narrower type
            raise ValueError(
                f"{str(path)!r} is not a tokenizer file: {error}; give a tokenizer.json as the "
                f"tokenizers library saves it, or bytes."
            ) from error
        self.num_tokens: int = self.tokenizer.get_vocab_size()
        if self.num_tokens == 0:
            raise ValueError(
                f"the tokenizer {str(path)!r} has 0 tokens; it must have at least 1, so train it "
                f"first."
            )

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens. A lone surrogate counts as U+FFFD."""
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False)

    def encode_with_byte_lengths(self, text: str) -> tuple[Int64Array, Int64Array]:
        """Token ids, and for each how many UTF-8 bytes of `text` it stands for.

        A token counts from its first character to the first character of the next token. So
        whitespace that the tokenizer drops counts too, and the lengths add up to the text, unless
        the text has no token at all.
        """
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, dtype=np.int64)
        utf8 = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
        is_first_byte = (utf8 & 0xC0) != 0x80
        byte_of_character = np.append(np.flatnonzero(is_first_byte), len(utf8))
        starts = byte_of_character[np.array([start for start, _ in encoding.offsets], dtype=int)]
        starts = np.maximum.accumulate(starts)
        starts[:1] = 0
        return ids, np.diff(np.append(starts, len(utf8)))


def token_cache(
    text: ByteStream, pieces: Sequence[Piece], vocabulary: TokenizerVocabulary, folder: Path
) -> TokenFile:
    """Tokenise a text once, into three files that later calls read.

    The text is read in parts of at most a mebibyte, which bounds the memory. A part ends with a
    line, unless a line is longer than that. Invalid UTF-8 is read as U+FFFD.

    Args:
        text: The text.
        pieces: The pieces of `text`; no token crosses from one to the next.
        vocabulary: The tokenizer.
        folder: Folder of the files; made if missing.

    Raises:
        ValueError: If the tokenizer finds no token in the text.
    """
    digest = hashlib.sha256(vocabulary.json_bytes)
    for piece in pieces:
        stat = piece.path.stat()
        numbers = f"\0{piece.start}\0{piece.stop}\0{stat.st_mtime_ns}\n"
        digest.update((piece.name + numbers).encode("utf-8", "surrogateescape"))
    token_dtype = np.dtype(np.uint16 if vocabulary.num_tokens <= 1 << 16 else np.uint32)
    stem = folder / digest.hexdigest()[:16]
    tokens_path = stem.with_suffix(f".tokens.u{8 * token_dtype.itemsize}")
    lengths_path, starts_path = stem.with_suffix(".lengths.u32"), stem.with_suffix(".starts.i64")
    if not (tokens_path.exists() and starts_path.exists()):
        folder.mkdir(parents=True, exist_ok=True)
        # The tokens take their name last (the outer block ends last), so where they are, all
        # files are whole.
        with (
            write_atomically(tokens_path) as tokens_part,
            write_atomically(lengths_path) as lengths_part,
            write_atomically(starts_path) as starts_part,
            tokens_part.open("wb") as tokens_file,
            lengths_part.open("wb") as lengths_file,
        ):
            starts = _tokenise(text, pieces, vocabulary, tokens_file, lengths_file, token_dtype)
            starts_part.write_bytes(np.array(starts, dtype=np.int64).tobytes())
    return TokenFile(tokens_path, token_dtype, lengths_path, starts_path, text)


def _tokenise(
    text: ByteStream,
    pieces: Sequence[Piece],
    vocabulary: TokenizerVocabulary,
    tokens_file: BinaryIO,
    lengths_file: BinaryIO,
    token_dtype: np.dtype[np.unsignedinteger[Any]],
) -> list[int]:
    """Write tokens and byte lengths; return the first token of each piece that has a token."""
    starts: dict[int, int] = {}  # by the number of the piece
    num_tokens = 0
    pending = np.zeros(0, dtype=np.int64)  # byte length of the last token, still growing
    lead = 0  # bytes before the first token of all
    for number, part in _parts(text, pieces):
        ids, lengths = vocabulary.encode_with_byte_lengths(part)
        num_bytes = len(part.encode("utf-8"))
        if len(ids) == 0:
            if len(pending):
                pending += num_bytes
            else:
                lead += num_bytes
            continue
        starts.setdefault(number, num_tokens)
        num_tokens += len(ids)
        lengths[0] += lead
        lead = 0
        tokens_file.write(ids.astype(token_dtype).tobytes())
        lengths_file.write(np.append(pending, lengths[:-1]).astype(np.uint32).tobytes())
        pending = lengths[-1:]
    if not len(pending):
        raise ValueError(
            "the tokenizer finds 0 tokens in the text; it must find at least 1, so use a tokenizer "
            "that was trained on such text."
        )
    lengths_file.write(pending.astype(np.uint32).tobytes())
    return list(starts.values())


def _parts(text: ByteStream, pieces: Sequence[Piece]) -> Iterator[tuple[int, str]]:
    """The decoded text in parts of bounded size, which end with a line where possible.

    Yields:
        The number of the piece, and a part of it.
    """
    start = 0
    for number, piece in enumerate(pieces):
        stop = start + piece.num_bytes
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while start < stop:
            part = text.text_of(start, min(stop, start + _PART_BYTES))
            if start + len(part) < stop and (line_end := part.rfind(b"\n")) >= 0:
                part = part[: line_end + 1]
            start += len(part)
            if decoded := decoder.decode(part, final=start == stop):
                yield number, decoded
