"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", metavar="PATH ...", help="Text files, or folders of them."),
]
# In `--text a b c` the option takes one value; the others arrive here.
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
        raise ValueError(
            f"{str(more[0])!r} belongs to no option; a text must be named with --text, so add that."
        )
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
            f"{option} is {value!r}; it must be integers with commas between them, such as "
            f"256,512,1024."
        ) from error
