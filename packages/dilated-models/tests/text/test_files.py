"""Which files are the text, and the split: the same every time, on every machine."""

import os
from pathlib import Path

import pytest
from dilated_models.text.files import Piece, split_files, standard_library_files, text_files


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
    with pytest.raises(ValueError, match=r"there is no text in '.*', only empty or binary files"):
        text_files([tmp_path])


@pytest.mark.skipif(os.name != "posix", reason="makes a FIFO")
def test_a_pipe_or_device_is_refused_also_beside_other_text(text: Path, tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(ValueError, match=rf"'{path}' is a pipe, a device or a socket; a text"):
            text_files([text, path])


def test_models_inside_a_folder_of_text_are_no_text(text: Path):
    before = text_files([text])
    run = text / "runs" / "one"
    (run / "tokens").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "metrics.jsonl", "tokens/x"):
        (run / name).write_text("a")
    assert text_files([text]) == before
    assert len(text_files([run])[0]) == 4  # one that is named is read
    (run / "model.safetensors").unlink()
    assert len(text_files([text])[0]) == len(before[0]) + 3


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


def test_the_fingerprint_sees_names_and_every_byte(text: Path):
    def fingerprint() -> str:
        return split_files(*text_files([text]), validation_share=0.1).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    (text / "file1.py").rename(text / "renamed.py")
    renamed = fingerprint()
    content = (text / "renamed.py").read_bytes()
    (text / "renamed.py").write_bytes(content[:-1] + b"x")
    edited = fingerprint()  # of equal size
    (text / "renamed.py").write_text("x")
    assert len({before, renamed, edited, fingerprint()}) == 4


def test_names_that_are_not_utf8(tmp_path: Path):
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("text " * 100)
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert len(split_files(*text_files([tmp_path]), validation_share=0.1).fingerprint()) == 16


def test_a_folder_that_cannot_be_listed_is_an_error(text: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("nested"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="nested"):
        text_files([text])
