"""`dilated generate`: where the prompt comes from, what is written when, turns, terminals."""

import io
import re
import sys
from pathlib import Path

import pytest
import torch
from dilated_models import GenerationCache, LongNetLM, generate
from dilated_models.cli.app import app, run
from dilated_models.cli.text_output import TextOutput
from dilated_models.longnet import generation
from dilated_models.longnet.saving import load_model, save_model, write_config
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with drawn weights, which writes any bytes."""
    torch.manual_seed(0)
    model = LongNetLM(
        num_tokens=256, d_model=32, nhead=4, num_decoder_layers=1, dim_feedforward=32,
        segment_lengths=[8, 32], dilation_rates=[1, 2],
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model")
    write_config(path, {"model": model.config.to_dict(), "tokenizer": "bytes"})
    save_model(path, model)
    return path


def call(folder: Path, *arguments: object, given: bytes = b"", code: int = 0) -> bytes:
    words = ["generate", "--checkpoint", folder, "--max-new-tokens", 40, *arguments]
    result = CliRunner().invoke(app, [str(a) for a in words], input=given)
    assert result.exit_code == code, result.output
    return result.stdout_bytes


def continuation(folder: Path, prompt: bytes, **options: object) -> bytes:
    defaults = {"max_new_tokens": 40, "temperature": 0.8}
    return bytes(generate(load_model(folder), prompt, **(defaults | options)))


def test_a_prompt_comes_from_an_option_a_file_or_a_pipe(folder, tmp_path):
    """All bytes of a file count, and what is written is the prompt and the drawn bytes."""
    text = b"caf\xe9 \xff\x00\r\n"
    (tmp_path / "prompt").write_bytes(text)
    want = text + continuation(folder, text)
    assert call(folder, "--prompt-file", tmp_path / "prompt") == want
    assert call(folder, "--prompt-file", "-", given=text) == want
    assert call(folder, given=text) == want
    assert call(folder, "--prompt", text.decode("utf-8", "surrogateescape")) == want
    with pytest.raises(UnicodeDecodeError):
        want.decode()


def test_options_of_the_draws(folder):
    options = {"temperature": 1.3, "top_k": 50, "top_p": 0.7, "seed": 3}
    words = [x for name, value in options.items() for x in (f"--{name.replace('_', '-')}", value)]
    assert call(folder, "--prompt", "a", *words) == b"a" + continuation(folder, b"a", **options)


def test_each_line_continues_the_text_so_far(folder):
    """An empty line lets the model go on; every turn has its own draws."""
    model = load_model(folder)
    cache = GenerationCache(model)
    turns, newest = [], b""
    for seed, line in enumerate([b"first", b"def ", b"", b"\xc3\xa9"]):
        tokens = generate(
            model, newest + line, max_new_tokens=40, temperature=0.8, seed=seed, cache=cache
        )
        turns.append(bytes(tokens))
        newest = turns[-1][-1:]
    got = call(folder, "--interactive", "--prompt", "first", given=b"def \r\n\n\xc3\xa9\n")
    assert got == b"first" + b"".join(
        turn + end for turn, end in zip(turns, [b"", b"\n", b"\n", b"\n"], strict=True)
    )
    without = call(folder, "--interactive", given=b"\n\nfirst\n")  # nothing to continue at first
    assert without == turns[0] + b"\n"


class Terminal(io.TextIOWrapper):
    """A stdout that is a terminal, and notes each write."""

    def __init__(self, encoding: str, is_terminal: bool = True) -> None:
        self.written = io.BytesIO()
        self.pieces: list[bytes] = []
        super().__init__(self.written, encoding=encoding)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def flush(self) -> None:
        super().flush()
        self.pieces.append(self.written.getvalue())


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "é€\\xff\\x1b[1m\n\tz\\x00\\u202e\\xe2\\x82\n"),
        ("latin-1", "é\\u20ac\\xff\\x1b[1m\n\tz\\x00\\u202e\\xe2\\x82\n"),
        ("ascii", "\\xe9\\u20ac\\xff\\x1b[1m\n\tz\\x00\\u202e\\xe2\\x82\n"),
    ],
)
def test_a_terminal_shows_what_it_cannot_print(monkeypatch, encoding, shown):
    """Characters cut between pieces are whole; a cut one at the end is bytes."""
    terminal = Terminal(encoding)
    monkeypatch.setattr(sys, "stdout", terminal)
    output = TextOutput()
    text = "é€".encode() + b"\xff\x1b[1m\n\tz\x00" + "\u202e".encode() + b"\xe2\x82"
    for i in range(len(text)):
        output.write(text[i : i + 1])
    output.end(has_newline=False)
    assert terminal.written.getvalue() == shown.encode(encoding)
    output.write(b"line\n")
    output.end(has_newline=False)
    assert terminal.written.getvalue().endswith(b"line\n")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_text_is_written_as_it_is_made(folder, monkeypatch, is_terminal):
    stdout = Terminal("utf-8", is_terminal)
    monkeypatch.setattr(sys, "stdout", stdout)
    drawn = iter(b"xyz")

    def draw(self, logits, generator):
        seen.append(stdout.written.getvalue())
        return next(drawn)

    seen: list[bytes] = []
    monkeypatch.setattr(generation.Sampling, "draw", draw)
    words = ["generate", "--checkpoint", str(folder), "--prompt", "ab", "--max-new-tokens", "3"]
    assert run(words) == 0
    assert seen == [b"ab", b"abx", b"abxy"]
    assert stdout.written.getvalue() == (b"abxyz\n" if is_terminal else b"abxyz")


def test_ctrl_c_ends_the_line(folder, monkeypatch, capfdbinary):
    def draw(self, logits, generator):
        if next(count):
            raise KeyboardInterrupt
        return ord("x")

    count = iter([0, 0, 1])
    monkeypatch.setattr(generation.Sampling, "draw", draw)
    assert run(["generate", "--checkpoint", str(folder), "--prompt", "ab"]) == 130
    captured = capfdbinary.readouterr()
    assert captured.out == b"abxx\n"
    assert captured.err.splitlines() == [b"dilated: stopped by Ctrl-C"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--prompt-file", "b"], "--prompt and --prompt-file are both given"),
        (["--prompt-file", "{folder}/nowhere"], "No such file or directory: '{folder}/nowhere'"),
        (["--prompt-file", "{folder}"], "Is a directory: '{folder}'"),
        (["--prompt-file", "-", "--interactive"], "--prompt-file is - and --interactive is given"),
        ([], "the prompt is empty; it must hold at least one token"),
        (["--prompt", "a", "--top-p", "0"], "top.p is 0.0; it must be above 0"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max.new.tokens is 0; it must be at least 1"),
        (["--interactive", "--max-new-tokens", "0"], "max.new.tokens is 0; it must be at least 1"),
        (["--interactive", "--seed", str(2**70)], "seed is 1180591620717411303424; it must be"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message):
    words = [a.replace("{folder}", str(folder)) for a in arguments]
    result = CliRunner().invoke(app, ["generate", "--checkpoint", str(folder), *words])
    assert result.exit_code == 2
    assert re.search(message.replace("{folder}", str(folder)), result.stderr)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_a_terminal_without_a_prompt_is_not_waited_for(folder, monkeypatch):
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Keyboard())
    with pytest.MonkeyPatch.context() as patch:
        stderr = io.StringIO()
        patch.setattr(sys, "stderr", stderr)
        assert run(["generate", "--checkpoint", str(folder)]) == 2
    assert "there is no prompt; give one with --prompt" in stderr.getvalue()
