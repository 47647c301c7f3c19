"""A run's folder belongs to one process at a time, and holds a whole run or nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from dilated_models.longnet.saving import CONFIG_FILE

LOCK_FILE = ".lock"
# Windows lets no other process read a locked byte, so the lock lies beyond the text of the file.
_LOCKED_BYTE = 1 << 20


@contextmanager
def hold(folder: Path, *, is_new: bool) -> Generator[None]:
    """Keep other processes out of a run's folder in the `with` block.

    The folder is made if it is missing. If no run was begun when the block ends, which is the case
    until `config.json` exists, the folders that were made are removed again.

    Args:
        folder: Of the run.
        is_new: Whether the folder may hold no run yet.

    Raises:
        FileExistsError: If it holds one though it must be new, or is a file.
        ValueError: If another process holds the folder.
    """
    if is_new:
        check_free(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            if is_new:  # again: another process may have begun a run in between
                check_free(folder)
            for part in folder.rglob(".*.part"):  # of a process that was killed
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part, ignore_errors=True)
                else:
                    part.unlink(missing_ok=True)
            yield
    finally:
        if made and not (folder / CONFIG_FILE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            for path in made[1:]:
                with contextlib.suppress(OSError):
                    path.rmdir()


def check_free(folder: Path) -> None:
    """Check that a new run may begin in a folder.

    Raises:
        FileExistsError: If the folder holds a run, or is a file or a link to nothing.
    """
    if (folder / CONFIG_FILE).exists():
        raise FileExistsError(
            f"{str(folder)!r} already holds a run; --out must be a new folder, so choose another, "
            f"or continue the run with --resume."
        )
    for parent in (folder, *folder.parents):
        if parent.is_symlink() and not parent.exists():
            raise FileExistsError(
                f"{str(parent)!r} is a symbolic link to nothing; --out must be a folder, so choose "
                f"another, or make the folder that the link names."
            )
        if parent.exists():
            if not parent.is_dir():
                raise FileExistsError(
                    f"{str(parent)!r} is a file; --out must be a folder, so choose another."
                )
            return


@contextmanager
def _lock(folder: Path) -> Generator[None]:
    """Hold a lock that ends with this process, however it ends."""
    path = folder / LOCK_FILE
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _try_lock(number):
                raise ValueError(
                    f"another process{_holder(number)} writes to {str(folder)!r}; a run can have "
                    f"one process, so wait for that one, stop it, or use another --out."
                )
            # The holder before may have removed the file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(number), path.stat()):
                    break
        except BaseException:
            os.close(number)
            raise
        os.close(number)
    try:
        os.truncate(number, 0)
        os.write(number, f"{os.getpid()}\n".encode())
        yield
    finally:
        if os.name == "posix":  # Windows removes no open file, and nobody else may hold it now
            path.unlink(missing_ok=True)
            os.close(number)
        else:
            os.close(number)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _holder(number: int) -> str:
    text = os.pread(number, 32, 0) if hasattr(os, "pread") else os.read(number, 32)
    return f" ({text.decode('ascii').strip()})" if text.strip().isdigit() else ""


def _try_lock(number: int) -> bool:
    """Lock an open file; False if another process holds it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(number, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(number, msvcrt.LK_NBLCK, 1)
            os.lseek(number, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
            return False
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise  # else: a file system without locks, where a run is better than none
    return True
