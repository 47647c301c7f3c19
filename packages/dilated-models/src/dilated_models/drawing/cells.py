"""A prompt cut into cells that can be shown: a character or a token each, never part of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dilated_models.text.vocabulary import ByteVocabulary, Vocabulary

_LONGEST = 4  # a character of UTF-8 has at most four bytes, and so at most four tokens
_UNDECODABLE = "\ufffd"
_SYMBOLS = {"\n": "↵", "\t": "→", "\r": "␍"}


class Cell(NamedTuple):
    """The tokens `start` to before `stop`, and their text in printable characters."""

    start: int
    stop: int
    text: str
    ends_line: bool


def cut_into_cells(tokens: Sequence[int], vocabulary: Vocabulary) -> list[Cell]:
    """Cells in the order of the tokens; tokens that only together are a character share one."""
    cells: list[Cell] = []
    start = 0
    while start < len(tokens):
        stop, text = _decode_whole(tokens, start, vocabulary)
        cells.append(Cell(start, stop, printable(text), text.endswith("\n")))
        start = stop
    return cells


def printable(text: str) -> str:
    """Line ends and tabs as symbols, other characters that cannot be printed as escapes."""
    return "".join(_SYMBOLS.get(c) or (c if c.isprintable() else escaped(c)) for c in text)


def escaped(character: str) -> str:
    r"""A character in ASCII, such as `\x1b` or `\u200b`."""
    return character.encode("unicode_escape").decode("ascii")


def _decode_whole(tokens: Sequence[int], start: int, vocabulary: Vocabulary) -> tuple[int, str]:
    for stop in range(start + 1, min(start + _LONGEST, len(tokens)) + 1):
        text = vocabulary.decode(tokens[start:stop])
        if _UNDECODABLE not in text:
            return stop, text
    if isinstance(vocabulary, ByteVocabulary):
        return start + 1, f"\\x{tokens[start]:02x}"
    return start + 1, _UNDECODABLE
