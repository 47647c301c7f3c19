"""Command lines that a message offers: how this process was started, and names a shell reads."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


def command(*words: str | Path) -> str:
    """A line to copy into a shell; it starts `dilated` as this process was started.

    Example:
        >>> command("train", "--resume", "--out", Path("my run"))
        "dilated train --resume --out 'my run'"
    """
    return " ".join([*_program(), *map(quoted, words)])


def train_command(*words: str | Path, processes: int, machines: int = 1) -> str:
    """A line as of `command` that trains, on this many processes, all machines together.

    Example:
        >>> train_command("--resume", processes=2)
        'torchrun --nproc-per-node 2 -m dilated_models.train --resume'
        >>> train_command("--resume", processes=16, machines=2)  # on each of them
        'torchrun --nnodes 2 --nproc-per-node 8 -m dilated_models.train --resume'
    """
    if processes == 1:
        return command("train", *words)
    by_uv = ["uv", "run"] if _is_by_uv() else []
    nodes = [] if machines == 1 else ["--nnodes", str(machines)]
    start = ["torchrun", *nodes, "--nproc-per-node", str(processes // machines)]
    return " ".join([*by_uv, *start, "-m", "dilated_models.train", *map(quoted, words)])


def quoted(word: str | Path) -> str:
    r"""A word or path as a shell reads it, in characters that every output can show.

    Example:
        >>> quoted(Path("two words"))
        "'two words'"
        >>> quoted(os.fsdecode(b"no utf-8: \xff"))
        "$'no utf-8: \\xff'"
    """
    text = str(word)
    if os.name == "nt":
        return subprocess.list2cmdline([text])
    if text.isprintable() and _is_encodable(text):
        return shlex.quote(text)
    # bash, zsh, ksh and newer versions of sh read $'...' with the numbers of bytes in it.
    parts = (
        chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}"
        for byte in os.fsencode(text)
    )
    return f"$'{''.join(parts)}'"


def _is_encodable(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_by_uv() -> bool:
    return "UV_RUN_RECURSION_DEPTH" in os.environ  # `uv run` sets it in its children


def _program() -> list[str]:
    script = Path(sys.argv[0])
    by_uv = _is_by_uv()
    if script.parts[-2:] in (("dilated_models", "__main__.py"), ("dilated_models", "train.py")):
        python = ["uv", "run", "python"] if by_uv else [quoted(sys.orig_argv[0])]
        return [*python, "-m", "dilated_models"]
    if by_uv:
        return ["uv", "run", "dilated"]
    found = shutil.which("dilated")
    is_elsewhere = script.stem == "dilated" and (found is None or not script.samefile(found))
    return [quoted(script)] if is_elsewhere else ["dilated"]
