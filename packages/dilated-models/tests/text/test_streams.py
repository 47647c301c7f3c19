"""Many files as one long sequence of bytes, a bounded number of them open."""

import itertools
import mmap
from pathlib import Path

import numpy as np
import pytest
from dilated_models.text.files import text_files
from dilated_models.text.streams import ByteStream


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
    with pytest.raises(
        IndexError, match=r"start is 0 and stop \d+; they must be in order and within the \d+ bytes"
    ):
        stream.text_of(0, len(stream) + 1)


def test_few_files_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for i in range(200):
        (tmp_path / f"{i:03}.txt").write_text(f"{i:03}")
    opened: list[mmap.mmap] = []
    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    stream = ByteStream(text_files([tmp_path])[0])
    assert stream.text_of(0, 600) == b"".join(b"%03d" % i for i in range(200))
    assert len(opened) == 200
    assert sum(not mapped.closed for mapped in opened) == 64
