"""Files, split, streams and order: the same text and windows every time, at bounded cost."""

import itertools
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
from dilated_models.training.files import (
    Piece,
    split_files,
    standard_library_files,
    text_files,
)
from dilated_models.training.order import WindowOrder
from dilated_models.training.streams import ByteStream


def test_the_standard_library_is_found_and_split():
    pieces, skipped = standard_library_files()
    assert skipped == 0
    assert {"os.py", "json/__init__.py", "asyncio/base_events.py"} <= {p.name for p in pieces}
    assert all(piece.name.endswith(".py") and piece.num_bytes > 0 for piece in pieces)
    assert not [piece for piece in pieces if "site-packages" in piece.name]
    split = split_files(pieces, 0, validation_share=0.05)
    train, validation = ({p.name for p in side} for side in (split.train, split.validation))
    assert train.isdisjoint(validation)
    assert len(train) + len(validation) == len(pieces)
    assert 0.02 < len(validation) / len(pieces) < 0.08
    # By name alone: this holds for every Python that has these files.
    assert {"copyreg.py", "opcode.py", "sched.py", "secrets.py", "traceback.py"} <= validation
    assert {"os.py", "ast.py", "json/__init__.py"} <= train


def test_a_folder_is_read_in_the_order_of_names(text: Path):
    pieces, skipped = text_files([text])
    names = [piece.name for piece in pieces]
    assert names == sorted(names)
    assert len(names) == 30
    assert "nested/file0.py" in names
    assert skipped == 1  # the image; the hidden and the empty file do not count
    again, _ = text_files([text, text / "file1.py", text / "nested"])
    assert sorted(p.path for p in again) == sorted(p.path for p in pieces)  # none twice


def test_a_named_file_is_taken_as_it_is(text: Path):
    pieces, skipped = text_files([text / "image.png"])
    assert [p.name for p in pieces] == ["image.png"]
    assert skipped == 0


def test_missing_and_empty_text(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder '.*nowhere'"):
        text_files([tmp_path / "nowhere"])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"there is no text in '.*': only empty or binary files"):
        text_files([tmp_path])


def test_the_split_is_a_function_of_names(text: Path):
    pieces, skipped = text_files([text])
    split = split_files(pieces, skipped, validation_share=0.2)
    backwards = split_files(pieces[::-1], skipped, validation_share=0.2)
    assert backwards.validation[::-1] == split.validation
    # Another file moves none of the others.
    more = [*pieces, Piece(text / "new.py", "new.py", 0, 10)]
    larger = split_files(more, skipped, validation_share=0.2)
    assert {p.name for p in larger.validation} - {"new.py"} == {p.name for p in split.validation}
    # Known values of the hash: the split must not change between versions or machines.
    assert sorted(p.name for p in split.validation) == EXPECTED_VALIDATION


EXPECTED_VALIDATION = [
    "file11.py",
    "file14.py",
    "nested/file0.py",
    "nested/file15.py",
    "nested/file27.py",
    "nested/file3.py",
]


@pytest.mark.parametrize("share", [1e-9, 0.5, 1 - 1e-9])
def test_neither_side_is_ever_empty(text: Path, share: float):
    pieces, _ = text_files([text])
    split = split_files(pieces, 0, validation_share=share)
    assert split.train
    assert split.validation
    assert {p.name for p in split.train}.isdisjoint(p.name for p in split.validation)


def test_few_files_are_cut_in_two(text: Path):
    pieces, _ = text_files([text / "file1.py", text / "file2.py"])
    split = split_files(pieces, 0, validation_share=0.1)
    for head, tail, whole in zip(split.train, split.validation, pieces, strict=True):
        assert (head.start, head.stop, tail.stop) == (0, tail.start, whole.stop)
        assert tail.num_bytes == whole.num_bytes // 10


def test_the_fingerprint_sees_renames_and_sizes(text: Path):
    def fingerprint() -> str:
        return split_files(*text_files([text]), validation_share=0.1).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (text / "file1.py").rename(text / "renamed.py")
    renamed = fingerprint()
    (text / "renamed.py").write_text("x")
    assert len({before, renamed, fingerprint()}) == 3


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
    with pytest.raises(IndexError, match="not inside a text of"):
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


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(101, 10), (1000, 7), (12, 10), (11, 10)])
def test_every_window_comes_once_per_epoch(num_tokens: int, seq_len: int):
    order = WindowOrder(num_tokens=num_tokens, seq_len=seq_len, seed=3)
    n = order.windows_per_epoch
    for epoch in range(3):
        starts = sorted(order.start(epoch * n + i) for i in range(n))
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= num_tokens
        assert all(b - a == seq_len for a, b in itertools.pairwise(starts))


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    def starts(seed: int) -> list[int]:
        order = WindowOrder(num_tokens=100_000, seq_len=16, seed=seed)
        return [order.start(i) for i in range(200)]

    torch.manual_seed(0)
    first = starts(0)
    torch.manual_seed(1)
    assert starts(0) == first
    assert starts(1) != first
    assert first != sorted(first)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2
    epochs = WindowOrder(num_tokens=1000, seq_len=10, seed=0)
    n = epochs.windows_per_epoch
    visits = [[epochs.start(e * n + i) // 10 for i in range(n)] for e in range(2)]
    assert visits[0] != visits[1]
    assert sorted(visits[0]) == sorted(visits[1])


def test_a_batch_is_inputs_and_the_next_tokens(text: Path):
    stream = ByteStream(text_files([text])[0])
    order = WindowOrder(num_tokens=len(stream), seq_len=32, seed=0)
    inputs, targets, num_bytes = order.batch(stream, step=5, batch_size=3)
    assert inputs.shape == targets.shape == (3, 32)
    assert inputs.dtype == targets.dtype == torch.int64
    assert num_bytes == 96
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    start = order.start(16)
    assert bytes(inputs[1].tolist()) == stream.text_of(start, start + 32)


def test_text_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"has 10 tokens, fewer than one window of seq_len \+ 1"):
        WindowOrder(num_tokens=10, seq_len=10, seed=0)
