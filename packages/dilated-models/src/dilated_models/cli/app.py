"""The commands of `dilated` as one application."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from dilated_models.cli.errors import Boundary
from dilated_models.cli.evaluate import evaluate
from dilated_models.cli.generate import generate
from dilated_models.cli.info import info
from dilated_models.cli.plan import plan
from dilated_models.cli.show import show
from dilated_models.cli.slide import slide
from dilated_models.cli.slide_finetune import finetune
from dilated_models.cli.train import train

app = typer.Typer(
    name="dilated",
    cls=Boundary,
    help="Train, evaluate and sample LongNet language models; embed whole slides.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, generate, plan, info):
    app.command()(command)
app.add_typer(show)
slide.command()(finetune)
app.add_typer(slide)


def _print_version(given: bool) -> None:
    if not given:
        return
    for package in ("dilated-models", "dilated-core", "dilated-kernels", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            typer.echo(f"{package} {version(package)}")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    """Train, evaluate and sample LongNet language models; embed whole slides."""


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; an error is one line on stderr."""
    _open_outputs()
    try:
        app(list(arguments))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    return 0


def _open_outputs() -> None:
    """Let stdout and stderr take every character, whatever their encoding, and exist."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell, as in `>&-`
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
