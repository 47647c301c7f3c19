"""The boundary of the command line: whatever fails is one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from dilated_models.cli.options import MODEL_FIELDS
from dilated_models.training.failures import NeedsRestart, RankLost
from dilated_models.training.stopping import StoppedAtOnce, stopping_at_once

FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130

# Names of fields in configurations and functions, where the option has another name.
_PARAMETER_OF = {
    "nhead": "heads",
    "num_kv_heads": "kv_heads",
    "num_heads": "heads",
    "num_decoder_layers": "layers",
    "dim_feedforward": "feed_forward",
    "learning_rate": "lr",
    "warmup_copies": "warm_up_copies",
    "activation_checkpointing": "checkpoint_activations",
    "context_parallel": "cp",
}
# The extra that brings a package, and what needs it.
_CLI = ("cli", "the command line")
_EXTRA_OF = dict.fromkeys(("matplotlib", "psutil", "rich", "tokenizers", "typer"), _CLI) | {
    "dilated_ring": ("ring", "--cp"),
    "tensorboard": ("tensorboard", "--tensorboard"),
    "h5py": ("slides", "a file of slide features"),
}
_SAVES_MEMORY = (
    *("seq_len", "batch_size", "accumulation", "checkpoint_activations", "on_out_of_memory"),
)
_QUOTED = r"""(?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*\""""


class Boundary(TyperGroup):
    """The commands; none of their errors leaves `main` as a traceback."""

    def main(self, args: Sequence[str] | None = None, *_: Any, **extra: Any) -> Any:
        """Run a command line, print the error if there is one, and exit with the code."""
        arguments = list(sys.argv[1:] if args is None else args)
        extra["standalone_mode"] = False
        code: object = 0
        try:
            _check_none_is_empty(arguments)
            code = super().main(arguments, **extra)
            sys.stdout.flush()
        except KeyboardInterrupt as stopped:
            raise SystemExit(_stopped(stopped).exit_code) from None
        except BrokenPipeError:
            _discard(sys.stdout)
            raise SystemExit(code or FAILED) from None
        except Exception as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # its text is the help, of many lines
                typer.echo(str(error), err=True)
            else:
                fail(_describe(error, self.options_of(arguments)))
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            _discard(sys.stdout)
            raise SystemExit(exit_code(error)) from error
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: Any) -> Any:
        """Run a command; typer would end it with code 130 after SIGTERM too, and print nothing."""
        with stopping_at_once():
            try:
                return super().invoke(ctx)
            except KeyboardInterrupt as stopped:
                raise _stopped(stopped) from None

    def options_of(self, arguments: Sequence[str]) -> dict[str, str]:
        """The option of each parameter of the command that these arguments name."""
        command: Any = self
        for word in arguments:
            command = getattr(command, "commands", {}).get(word, command)
        return {p.name: p.opts[0] for p in command.params if p.name and p.opts[0].startswith("--")}


def _check_none_is_empty(arguments: Sequence[str]) -> None:
    """Refuse an empty argument but that of --prompt: as a path it would be the current folder."""
    for before, word in zip(["", *arguments], arguments, strict=False):
        name, sign, value = word.partition("=")
        is_empty = not word or (name.startswith("--") and bool(sign) and not value)
        if is_empty and "--prompt" not in (before, name):
            raise ValueError(
                f"the argument after {(name or before)!r} is empty, as one is of a shell "
                f"variable that is not set; give a value, or leave the argument out."
            )


def fail(message: object, *, code: int = USAGE_ERROR) -> typer.Exit:
    """Print one line on stderr, and return the exception to raise."""
    line = " ".join(part.strip() for part in str(message).splitlines())
    with contextlib.suppress(OSError, ValueError):  # stderr may be full or closed
        typer.echo(f"dilated: {line}", err=True)
    return typer.Exit(code)


def _stopped(stopped: KeyboardInterrupt) -> typer.Exit:
    """Print the line about a signal, and return the exception to raise."""
    by_signal = isinstance(stopped, StoppedAtOnce)
    text = str(stopped) if by_signal else "stopped by Ctrl-C"
    code = stopped.exit_code if by_signal else INTERRUPTED
    return fail(_with_notes(text, stopped), code=code)


def _with_notes(text: str, error: BaseException) -> str:
    notes: list[str] = getattr(error, "__notes__", [])
    return "; ".join([text.rstrip("."), *notes]) if notes else text


def name_options(message: str, options: Mapping[str, str]) -> str:
    """Replace the names of parameters by those of a command's options, but for quoted text.

    Names that are also words, such as `steps`, are replaced where a sentence is about their value.

    Example:
        >>> name_options("nhead is 5; it must divide d_model.", {"heads": "--heads"})
        '--heads is 5; it must divide d_model.'
    """
    by_name = dict(options)
    by_name.update((k, options[v]) for k, v in _PARAMETER_OF.items() if v in options)
    if "model_options" in options:
        by_name.update((name, f"{options['model_options']} {name}") for name in MODEL_FIELDS)
    if not by_name:
        return message
    plain = [name for name in by_name if "_" not in name and name not in _PARAMETER_OF]
    rare = [name for name in by_name if name not in plain]
    patterns = [_QUOTED]
    if rare:
        patterns.append(rf"(?<![\w./-])(?:{'|'.join(rare)})(?![\w/=(])")
    if plain:
        patterns.append(rf"(?:^|(?<=; )|(?<=and ))(?:{'|'.join(plain)})(?= (?:is|has|must|may|\d))")
    return re.sub("|".join(patterns), lambda m: by_name.get(m[0], m[0]), message)


def option_of(name: str) -> str:
    """The option that gives the value of a parameter or field.

    Example:
        >>> option_of("nhead"), option_of("batch_size")
        ('--heads', '--batch-size')
    """
    parameter = "model_options" if name in MODEL_FIELDS else _PARAMETER_OF.get(name, name)
    return "--" + parameter.replace("_", "-")


def exit_code(error: Exception) -> int:
    """With which code a command ends after an error."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    is_fault = not _is_users(error) or isinstance(error, (FloatingPointError, RankLost))
    return FAILED if is_fault else USAGE_ERROR


def _is_users(error: Exception) -> bool:
    """Whether options, files, memory or numbers of the user explain the error."""
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").split(".")[0] in _EXTRA_OF
    kinds = (
        typer.TyperException,
        OSError,
        ValueError,
        TypeError,
        OverflowError,
        FloatingPointError,
        NeedsRestart,
        RankLost,
    )
    return isinstance(error, kinds) or _is_out_of_memory(error)


def _is_out_of_memory(error: Exception) -> bool:
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def _describe(error: Exception, options: Mapping[str, str]) -> str:
    if not _is_users(error):
        text = _report(error)
    elif isinstance(error, typer.TyperException):
        text = error.format_message()
    elif isinstance(error, ModuleNotFoundError):
        extra, needing = _EXTRA_OF[(error.name or "").split(".")[0]]
        text = (
            f"{error.name} is not installed; {needing} needs the extra {extra}: "
            f"pip install 'dilated-models[{extra}]'"
        )
    elif isinstance(error, OSError) and error.strerror is not None:
        text = error.strerror + (f": {_shown(error.filename)}" if error.filename else "")
    elif _is_out_of_memory(error):
        known = [options[name] for name in _SAVES_MEMORY if name in options]
        fix = f"; it may fit with another {' or '.join(known)}" if known else ""
        text = f"out of memory: {str(error).splitlines()[0] if str(error) else 'no more'}{fix}"
    else:
        text = name_options(str(error), options)
    return _with_notes(text, error)


def _shown(filename: object) -> str:
    return repr(os.fsdecode(filename) if isinstance(filename, bytes) else str(filename))


def _report(error: Exception) -> str:
    """Write the traceback of a fault in this program to a file; return a line about it."""
    text = f"this is a fault in dilated: {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="dilated-fault-", suffix=".txt", delete=False, encoding="utf-8",
            errors="backslashreplace",
        ) as file:  # fmt: skip
            traceback.print_exception(error, file=file)
    except OSError:
        return text
    return f"{text}; please report it with the file {file.name}"


def _discard(stream: Any) -> None:
    """Let what an output could not take go nowhere, or Python writes it again when it exits."""
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        stream.flush()
        return
    with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
