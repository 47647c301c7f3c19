"""User errors as one line on stderr and exit code 2."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import typer

USAGE_ERROR = 2


def fail(message: object, *, code: int = USAGE_ERROR) -> typer.Exit:
    """Print one line on stderr, and return the exception to raise."""
    typer.echo(f"dilated: {' '.join(str(message).split())}", err=True)
    return typer.Exit(code)


@contextmanager
def user_errors() -> Generator[None]:
    """Wrap the part of a command that checks options and files, before any work.

    A ValueError, TypeError or OSError in it is a user error, so only its text is printed. A missing
    module is part of an extra.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise fail(
            f"{error.name} is not installed; this needs the extra cli: "
            f"pip install 'dilated-models[cli]'"
        ) from error
    except OSError as error:
        raise fail(_os_error_text(error)) from error
    except (ValueError, TypeError) as error:
        raise fail(error) from error


def _os_error_text(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
