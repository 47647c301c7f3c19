"""Many files as one long sequence of bytes, none of them kept open."""

import itertools
import os
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from dilated_models.text.files import text_files
from dilated_models.text.streams import ByteStream, TokenFile


def test_a_stream_is_the_files_end_to_end(text: Path):
    pieces, _ = text_files([text])
    pieces = [p._replace(start=3, stop=p.stop - 2) for p in pieces]
    expected = b"".join(p.path.read_bytes()[p.start : p.stop] for p in pieces)
    stream = ByteStream(pieces)
    assert len(stream) == len(expected)
    assert stream.text_of(0, len(stream)) == expected
    ends = list(itertools.accumulate(p.num_bytes for p in pieces))
    for start, stop in [(0, 0), (ends[0], ends[0]), (ends[0] - 1, ends[0] + 1), (5, ends[3] + 2)]:
        assert stream.text_of(start, stop) == expected[start:stop]
    assert stream.read(10, 14).tolist() == list(expected[10:14])
    assert stream.read(10, 14).dtype == np.int64
    assert stream.document_starts(0, len(stream)).tolist() == [0, *ends[:-1]]
    assert stream.document_starts(ends[0], ends[2]).tolist() == ends[:2]
    assert stream.document_starts(ends[0] + 1, ends[1]).tolist() == []
    with pytest.raises(
        IndexError, match=r"start is 0 and stop \d+; they must be in order and within the \d+ bytes"
    ):
        stream.text_of(0, len(stream) + 1)


def test_the_place_of_each_byte(text: Path):
    pieces, _ = text_files([text])
    stream = ByteStream([p._replace(start=3, stop=p.stop - 2) for p in pieces])
    for position, byte in enumerate(stream.text_of(0, len(stream))):
        path, offset = stream.place_of(position)
        assert path.read_bytes()[offset] == byte
    assert stream.place_of(0) == (pieces[0].path, 3)
    with pytest.raises(IndexError, match="must be at least 0 and below"):
        stream.place_of(len(stream))


def test_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text(f"{i:03}")
    pieces, _ = text_files([tmp_path])
    opened: list[IO[Any]] = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda *a: opened.append(real(*a)) or opened[-1])
    assert ByteStream(pieces).text_of(0, 600) == b"".join(b"%03d" % i for i in range(200))
    assert len(opened) == 200
    assert all(file.closed for file in opened)


def test_a_file_cut_short_or_removed_is_an_error(tmp_path: Path):
    """A mapped file would end the process with SIGBUS here."""
    path, other = tmp_path / "text.txt", tmp_path / "zother.txt"
    path.write_bytes(bytes(range(256)) * 4096)
    other.write_text("other")
    stream = ByteStream(text_files([path, other])[0])
    assert stream.text_of(1 << 16, (1 << 16) + 3) == b"\0\1\2"
    os.truncate(path, 8192)
    assert stream.text_of(256, 259) == b"\0\1\2"
    with pytest.raises(OSError, match=r"text\.txt' has become shorter since it was opened; put"):
        stream.text_of(1 << 19, (1 << 19) + 100)
    other.unlink()
    with pytest.raises(FileNotFoundError):
        stream.text_of(len(stream) - 5, len(stream))


def test_tokens_cut_short_are_an_error(tmp_path: Path, text: Path):
    tokens, lengths = tmp_path / "x.u16", tmp_path / "x.u32"
    np.arange(5000, dtype=np.uint16).tofile(tokens)
    np.ones(5000, dtype=np.uint32).tofile(lengths)
    starts = tmp_path / "x.i64"
    np.array([0, 70], dtype=np.int64).tofile(starts)
    source = ByteStream(text_files([text])[0])
    stream = TokenFile(tokens, np.dtype(np.uint16), lengths, starts, source)
    assert stream.document_starts(1, 5000).tolist() == [70]
    assert stream.read(4000, 4003).tolist() == [4000, 4001, 4002]
    assert stream.byte_lengths(4000, 4002).tolist() == [1, 1]
    assert len(stream.read(4998, 6000)) == 2  # as a slice
    os.truncate(tokens, 100)
    with pytest.raises(OSError, match=r"x\.u16' has become shorter since it was opened"):
        stream.read(4000, 4003)
    with pytest.raises(OSError, match=r"has 50 tokens and .* 5000; they must have as many, so"):
        TokenFile(tokens, np.dtype(np.uint16), lengths, starts, ByteStream([]))
