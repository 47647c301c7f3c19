"""Files that are written whole or not at all: every replaced file of all packages passes here."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Generator[Path]:
    """Yield the path of a new file, which replaces `path` when the block ends without an error.

    The new file lies beside `path`. Its content reaches the disk before it takes the name, so a
    crash at any moment leaves the old file or the new one, whole. After an error `path` is
    unchanged and the new file is gone. If `path` is a symbolic link, the new file replaces the
    link; the file behind the link is unchanged. The umask decides on the permissions, even if the
    block puts a file of its own in place of the new one, as some libraries do.

    Args:
        path: The file to make or replace, in a folder that exists.

    Yields:
        The path of an empty file to write to.

    Raises:
        OSError: If the folder does not exist or cannot be written to. Its file name is `path`.
        ValueError: If `path` is a folder, a device or anything else that is no regular file.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "numbers")
        ...     with write_atomically(path) as part:
        ...         _ = part.write_text("1 2 3")
        ...     path.read_text()
        '1 2 3'
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(
            f"the path is {str(path)!r}, which is no regular file; it must be one that can be "
            f"replaced, so give the name of a file."
        )
    # A name that nobody can guess, created with O_EXCL ("x"): no link that lies there is followed,
    # and two processes that write the same file have a part each.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    with _named(path, part):
        part.open("xb").close()
        mode = stat.S_IMODE(part.stat().st_mode)
        try:
            yield part
            part.chmod(mode)
            _sync(part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    if os.name == "posix":  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def _named(path: Path, part: Path) -> Generator[None]:
    """Name `path` in an OSError that names `part` or, like that of a full disk, no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in (None, part, str(part)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(path: Path) -> None:
    """Wait until the file's content is on the disk."""
    with path.open("rb+") as file:  # Windows syncs no file that is open for reading only
        os.fsync(file.fileno())
