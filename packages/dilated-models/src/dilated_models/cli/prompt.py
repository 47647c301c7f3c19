"""The text that a command begins with: from an option, a file or stdin."""

from __future__ import annotations

import sys
from pathlib import Path


def read_prompt(
    prompt: str | None, prompt_file: Path | None, interactive: bool | None = None
) -> bytes:
    """The text; empty if an interactive run begins without one.

    Args:
        prompt: Of `--prompt`.
        prompt_file: Of `--prompt-file`.
        interactive: Of `--interactive`; None if the command has no such option.

    Raises:
        ValueError: If the options contradict each other, or there is no text.
    """
    if prompt is not None and prompt_file is not None:
        raise ValueError("--prompt and --prompt-file are both given; give one of the two.")
    if prompt is not None:
        # Arguments that are no UTF-8 hold their bytes as surrogates.
        return prompt.encode("utf-8", "surrogateescape")
    reads_stdin = prompt_file is not None and str(prompt_file) == "-"
    if reads_stdin and interactive:
        raise ValueError(
            "--prompt-file is - and --interactive is given, and both read stdin; give one."
        )
    if prompt_file is not None and not reads_stdin:
        return prompt_file.read_bytes()
    if interactive:
        return b""
    if not reads_stdin and sys.stdin.isatty():
        more = "" if interactive is None else ", or type it with --interactive"
        raise ValueError(
            f"there is no prompt; give one with --prompt, --prompt-file or a pipe{more}."
        )
    return sys.stdin.buffer.read()
