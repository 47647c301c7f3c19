"""Errors of the user's world end a command with one line and an exit code, never a traceback."""

import errno
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from dilated_models.cli import main
from dilated_models.cli.app import run
from dilated_models.cli.errors import Boundary, fail, name_options, option_of
from dilated_models.cli.shell import command, quoted
from dilated_models.training.stopping import StoppedAtOnce
from typer.testing import CliRunner


def ended(body: Callable[[], Any]) -> Any:
    """The result of a command with this body."""
    app = typer.Typer(cls=Boundary, rich_markup_mode=None)

    @app.command()
    def train(
        heads: Annotated[int, typer.Option()] = 1,
        seq_len: Annotated[int, typer.Option()] = 1,
        steps: Annotated[int, typer.Option()] = 1,
    ) -> None:
        body()

    app.callback()(lambda: None)
    return CliRunner().invoke(app, ["train"])


def raising(error: BaseException) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def noted(error: BaseException) -> BaseException:
    error.add_note("continue with: dilated")
    return error


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (FULL, "No space left on device", 2),
        (OSError(errno.EROFS, "Read-only", "a  b"), "Read-only: 'a  b'", 2),
        (OSError(errno.ENOENT, "Not there", os.fsdecode(b"\xff")), r"Not there: '\udcff'", 2),
        (OSError("plain text"), "plain text", 2),
        (ValueError("nhead is 5.\n  More"), "--heads is 5. More", 2),
        (noted(ValueError("no.")), "no; continue with: dilated", 2),
        (TypeError("steps is 'x'; it"), "--steps is 'x'; it", 2),
        (ModuleNotFoundError("x", name="matplotlib.figure"), "matplotlib.figure is not inst", 2),
        (MemoryError(), "out of memory: no more; it may fit with another --seq-len", 2),
        (RuntimeError("[x] can't allocate memory: 8\nand"), "out of memory: [x] can't allocate", 2),
        (OverflowError("too large"), "too large", 2),
        (FloatingPointError("the loss is not finite"), "the loss is not finite", 1),
        (typer.Exit(5), "", 5),
        (KeyboardInterrupt(), "stopped by Ctrl-C", 130),
        (noted(StoppedAtOnce(15)), "stopped at once by SIGTERM; continue with: dilated", 143),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), "", 1),
    ],
    ids=lambda x: repr(x)[:40],
)
def test_every_kind_of_error(error, line, code):
    result = ended(raising(error))
    assert result.exit_code == code
    assert result.stderr.count("\n") == (1 if line else 0)
    assert result.stderr.startswith(f"dilated: {line}" if line else "")
    assert result.stdout == ""


@pytest.mark.parametrize("words", [["--out", ""], ["--out="], ["--out", "x", "--text", "a", ""]])
def test_an_empty_argument_is_not_the_current_folder(capsys, words):
    assert run(["train", *words]) == 2
    after = "a" if "a" in words else "--out"
    error = capsys.readouterr().err
    assert error.startswith(f"dilated: the argument after '{after}' is empty, as one is of a shell")
    assert run(["generate", "--checkpoint", "nowhere", "--prompt", "--x="]) == 2
    assert "'nowhere' has no config.json" in capsys.readouterr().err


def test_a_fault_of_the_program_is_one_line_and_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = ended(lambda: [][1])
    assert result.exit_code == 1
    assert re.fullmatch(
        r"dilated: this is a fault in dilated: IndexError: list index out of range; please report "
        r"it with the file \S+dilated-fault-\S+\.txt\n",
        result.stderr,
    )
    (report,) = tmp_path.iterdir()
    assert "Traceback" in report.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    assert ended(lambda: [][1]).stderr.endswith("list index out of range\n")


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (
            "nhead is 5 and d_model 32; nhead must divide d_model.",
            "--heads is 5 and --d-model 32; ",
        ),
        ("steps is 0; it must", "--steps is 0; it must"),
        ("the steps of 'seq_len' in \"nhead\"", "the steps of 'seq_len' in \"nhead\""),
        ("'/tmp/nhead/x' isn't there, nor model's nhead", "'/tmp/nhead/x' isn't there, nor mod"),
        ("it must be below seq_len + 1 = 3", "it must be below --seq-len + 1 = 3"),
        ("learning_rate is 0", "learning_rate is 0"),  # no option of this command
        ("segment_lengths[1] is 0", "--segment-lengths[1] is 0"),
    ],
)
def test_messages_name_options(message, named):
    names = ("heads", "d_model", "seq_len", "steps", "segment_lengths")
    assert name_options(message, {name: option_of(name) for name in names}).startswith(named)


def test_every_field_that_an_option_sets_is_named():
    """The mapping knows the options of the real commands, and none that is gone."""
    from dilated_models.cli import errors
    from dilated_models.cli.app import app

    group = typer.main.get_command(app)
    assert isinstance(group, Boundary)
    options = group.options_of(["train", "--seed", "1"])
    for name, parameter in errors._PARAMETER_OF.items():
        assert option_of(name) == options[parameter]
    assert group.options_of(["show", "pattern"])["head_offsets"] == "--head-offsets"
    assert group.options_of(["--version"]) == {"version": "--version"}


def test_a_message_of_several_lines_becomes_one(capsys):
    assert fail("first\n  second").exit_code == 2
    assert capsys.readouterr().err == "dilated: first second\n"


def test_names_in_commands_are_quoted(monkeypatch):
    assert quoted(Path("/runs/plain")) == "/runs/plain"
    assert quoted("two  words") == "'two  words'"
    assert quoted("it's") == "'it'\"'\"'s'"
    assert quoted("[red]") == "'[red]'"
    assert quoted(os.fsdecode(b"a\xff\n'\\")) == r"$'a\xff\x0a\x27\x5c'"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "latin-1"))
    assert quoted("é") == "'é'"
    assert quoted("€") == r"$'\xe2\x82\xac'"


def test_commands_start_as_this_process_was_started(monkeypatch, tmp_path):
    program = tmp_path / "dilated"
    program.touch(mode=0o755)
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert command("train", "--out", Path("my run")) == "dilated train --out 'my run'"
    monkeypatch.setenv("PATH", "")
    assert command("train") == f"{program} train"
    monkeypatch.setattr(sys, "argv", ["/site/dilated_models/__main__.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "dilated_models"])
    assert command("train") == "python3 -m dilated_models train"
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")
    assert command("train") == "uv run python -m dilated_models train"
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert command("train") == "uv run dilated train"
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/pytest"])
    assert command("train") == "dilated train"


def test_without_a_command_the_help_is_printed(capsys):
    assert run([]) == 2
    assert "\n  train " in capsys.readouterr().err


def test_the_version_needs_no_torch(capsys):
    assert run(["--version"]) == 0
    assert re.match(r"dilated-models \d+\.\d+", capsys.readouterr().out)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_any_output_encoding(monkeypatch, tmp_path, encoding):
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    name = tmp_path / os.fsdecode(b"\xe2\x82\xac \xff")
    assert run(["evaluate", "--checkpoint", str(name), "--text", str(tmp_path)]) == 2
    stderr.flush()
    assert stderr.buffer.getvalue().startswith(b"dilated: ")
    assert stderr.buffer.getvalue().count(b"\n") == 1


def test_an_output_that_takes_nothing(monkeypatch, capfd):
    """As `> /dev/full`, and as `>&-`, where Python has no stdout at all."""

    class Full(io.RawIOBase):
        def writable(self) -> bool:
            return True

        def write(self, _: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Full())))
    assert run(["--version"]) == 2
    assert capfd.readouterr().err == "dilated: No space left on device\n"
    monkeypatch.setattr(sys, "stdout", None)
    assert run(["--version"]) == 0


def test_ctrl_c_while_modules_are_imported(monkeypatch, capsys):
    monkeypatch.setattr("dilated_models.cli._run", lambda _: raising(KeyboardInterrupt())())
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == "dilated: stopped by Ctrl-C\n"
