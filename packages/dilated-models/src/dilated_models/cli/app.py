"""The commands of `dilated` as one application."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from dilated_models.cli.errors import USAGE_ERROR
from dilated_models.cli.evaluate import evaluate
from dilated_models.cli.generate import generate
from dilated_models.cli.info import info
from dilated_models.cli.show import show
from dilated_models.cli.train import train

app = typer.Typer(
    name="dilated",
    help="Train, evaluate and sample LongNet language models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (train, evaluate, generate, info):
    app.command()(command)
app.add_typer(show)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; usage errors are one line on stderr."""
    try:
        code: object = app(list(arguments), standalone_mode=False)
    except typer.TyperException as error:
        typer.echo(f"dilated: {error.format_message()}", err=True)
        return USAGE_ERROR
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0
