"""Options that several commands share, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="PATH ...", help="Text files, or folders of them."),
]
# `--text a b c`: an option takes one value, so the rest arrives here.
MoreTextArgument = Annotated[list[Path] | None, typer.Argument(hidden=True)]
CheckpointOption = Annotated[
    Path, typer.Option("--checkpoint", metavar="DIR", help="The --out folder of a training run.")
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (a CUDA device, else the CPU), cpu, cuda:0, mps.")
]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", help="Of matrix products: auto (bfloat16 on GPUs), float32, bfloat16."),
]


def all_text(text: Sequence[Path] | None, more: Sequence[Path] | None) -> list[Path] | None:
    """The paths after `--text`, or None if it was not given.

    Raises:
        ValueError: If there are stray arguments without `--text`.
    """
    if more and not text:
        raise ValueError(f"unexpected argument {str(more[0])!r}; text is named with --text PATH.")
    return [*text, *(more or [])] if text else None


def integers(option: str, value: str | None) -> list[int] | None:
    """Read `256,512,1024`.

    Raises:
        ValueError: If a part is no integer.
    """
    if value is None:
        return None
    try:
        return [int(part) for part in value.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{option} takes integers with commas between them, such as 256,512,1024; got "
            f"{value!r}."
        ) from error
