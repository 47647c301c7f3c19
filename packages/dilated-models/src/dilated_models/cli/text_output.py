"""Text on stdout as it is made: escaped on a terminal, byte for byte anywhere else."""

from __future__ import annotations

import codecs
import sys
from typing import Any


class TextOutput:
    r"""Writes pieces of a text to stdout, each at once.

    On a terminal, bytes that are no UTF-8, unprintable characters and characters that its encoding
    lacks are escaped, as in `\x1b`. Files and pipes get the bytes as they are.

    Attributes:
        is_terminal: Whether stdout is one.
    """

    def __init__(self) -> None:
        self.is_terminal = sys.stdout.isatty()
        self._decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        self._ends_a_line = True

    def write(self, piece: bytes) -> None:
        """Write a piece; a character may be cut between two pieces."""
        if self.is_terminal:
            self._write_characters(self._decoder.decode(piece))
        else:
            self._write_bytes(piece)

    def end(self, *, has_newline: bool) -> None:
        """End the text. On a terminal the cursor is then at the start of a line.

        Args:
            has_newline: Whether a newline follows the text in a file or pipe.
        """
        if not self.is_terminal:
            self._write_bytes(b"\n" if has_newline else b"")
            return
        self._write_characters(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        if not self._ends_a_line:
            self._write_characters("\n")

    def _write_characters(self, text: str) -> None:
        if not text:
            return
        self._ends_a_line = text.endswith("\n")
        shown = "".join(
            c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii")
            for c in text
        )
        self._write_bytes(shown.encode(sys.stdout.encoding or "utf-8", "backslashreplace"))

    def _write_bytes(self, data: bytes) -> None:
        sys.stdout.flush()  # of what others wrote as text
        stream: Any = sys.stdout.buffer
        stream.write(data)
        stream.flush()
