"""write_atomically: the old file or the new one, whole, and never through a link."""

import errno
import os
import re
import stat
import threading

import pytest
from dilated_core.atomic_write import write_atomically


@pytest.mark.parametrize("fails_in", ["the block", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_alone(tmp_path, monkeypatch, fails_in):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    if fails_in != "the block":
        monkeypatch.setattr(os, fails_in, fail)

    def write() -> None:
        with write_atomically(path) as part:
            part.write_text("half")
            if fails_in == "the block":
                fail()
            part.write_text("new, whole")

    with pytest.raises(OSError, match="no space left"):
        write()
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with write_atomically(str(path)) as part:
        part.write_text("new, whole")
    assert path.read_text() == "new, whole"
    assert os.listdir(tmp_path) == ["file"]


def test_the_content_is_on_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, f=real: order.append(n) or f(*a))
    with write_atomically(tmp_path / "file") as part:
        part.write_text("x")
    assert order == ["fsync", "replace", "fsync"]  # the last one is of the folder


def test_the_new_file_lies_beside_the_old_one_under_a_name_of_its_own(tmp_path):
    path = tmp_path / "file"
    with write_atomically(path) as first, write_atomically(path) as second:
        for part in (first, second):
            assert re.fullmatch(r"\.file\.[0-9a-f]{16}\.part", part.name)
            assert part.parent == tmp_path
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last


def test_writers_at_the_same_time_leave_one_whole_file(tmp_path):
    path, texts = tmp_path / "file", [str(i) * 100_000 for i in range(4)]

    def write(text: str) -> None:
        for _ in range(10):
            with write_atomically(path) as part, part.open("a") as file:
                for start in range(0, len(text), 10_000):
                    file.write(text[start : start + 10_000])

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert not path.exists() or path.read_text() in texts
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="makes symbolic links")
def test_links_are_not_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    path = tmp_path / "file"
    path.symlink_to(precious)
    with write_atomically(path) as part:
        part.write_text("new")
    assert (path.is_symlink(), path.read_text()) == (False, "new")
    # Even where the name of the part is known beforehand.
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    link = tmp_path / ".file.known.part"
    link.symlink_to(precious)
    with pytest.raises(FileExistsError), write_atomically(path):
        pass
    assert precious.read_text() == "precious"
    assert link.is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="makes a named pipe")
def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ValueError, match="which is no regular file"), write_atomically(path):
            pass
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "no folder" / "file"):
        pass


@pytest.mark.skipif(os.name != "posix", reason="the umask is POSIX")
def test_other_users_may_read_what_the_umask_lets_them_read(tmp_path):
    before = os.umask(0o027)
    try:
        with write_atomically(tmp_path / "file") as part:
            part.write_text("x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


@pytest.mark.skipif(os.name != "posix", reason="the umask is POSIX")
def test_a_library_that_makes_its_own_private_file_changes_no_permissions(tmp_path):
    """As safetensors does: a new file with mode 0600, moved over the part."""
    before = os.umask(0o022)
    try:
        with write_atomically(tmp_path / "file") as part:
            own = tmp_path / "own"
            own.touch(mode=0o600)
            own.replace(part)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


def test_errors_name_the_file_and_not_its_part(tmp_path):
    path = tmp_path / "gone" / "file"
    with pytest.raises(FileNotFoundError) as caught, write_atomically(path):
        pass
    assert caught.value.filename == str(path)
    path.parent.mkdir()
    with pytest.raises(OSError) as caught, write_atomically(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(caught.value) == f"[Errno {errno.ENOSPC}] No space left on device: {str(path)!r}"
    with pytest.raises(OSError) as caught, write_atomically(path):
        raise OSError(errno.EACCES, "Permission denied", "another")
    assert caught.value.filename == "another"
