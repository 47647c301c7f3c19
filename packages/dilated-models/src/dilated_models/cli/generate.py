"""`dilated generate`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dilated_models.cli.options import CheckpointOption, DeviceOption
from dilated_models.cli.prompt import read_prompt
from dilated_models.cli.text_output import TextOutput

if TYPE_CHECKING:
    from dilated_models.longnet.generation import Sampling
    from dilated_models.longnet.language_model import LongNetLM
    from dilated_models.text.vocabulary import Vocabulary


def generate(
    checkpoint: CheckpointOption,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue. By default, what is piped to stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File with the text to continue; - is stdin."),
    ] = None,
    interactive: Annotated[
        bool,
        typer.Option(
            "--interactive",
            help="Read lines from stdin, add each to the text so far and continue it.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(help="Number of tokens to write; of each continuation.")
    ] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1 sharpens, above 1 flattens; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among this many likeliest tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens of this probability together.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Continue a text with a trained model, and write it as it is made.

    On a terminal unprintable characters are escaped. A file or a pipe gets the exact bytes of the
    prompt and its continuation.
    """
    from dilated_core.checks import check_integer

    from dilated_models.longnet.generation import Sampling, seeds_from
    from dilated_models.longnet.saving import load_model, load_vocabulary
    from dilated_models.training.devices import choose_device

    text = read_prompt(prompt, prompt_file, interactive)
    sampling = Sampling.of(temperature, top_k, top_p)
    check_integer("max_new_tokens", max_new_tokens, at_least=1)
    seeds_from(seed, 1)
    model = load_model(checkpoint, device=choose_device(device))
    vocabulary = load_vocabulary(checkpoint)
    talk = _Conversation(model, vocabulary, max_new_tokens, sampling, seed, interactive)
    if not text and not interactive:
        raise ValueError("the prompt is empty; it must hold at least one token.")
    if text:
        talk.continue_with(text, is_line=False)
    if interactive:
        _read_lines(talk)


def _read_lines(talk: _Conversation) -> None:
    """Continue the text after each line, until the input ends."""
    is_terminal = sys.stdin.isatty()
    while True:
        if is_terminal:
            print("> ", end="", file=sys.stderr, flush=True)
        line = b""
        try:
            line = sys.stdin.buffer.readline()
        finally:
            if is_terminal and not line:  # Ctrl-D or Ctrl-C
                print(file=sys.stderr)
        if not line:
            return
        line = line.removesuffix(b"\n").removesuffix(b"\r")
        # A line that is empty lets the model go on with its own text.
        if line or talk.has_text:
            talk.continue_with(line, is_line=True)


class _Conversation:
    """A text that grows by turns: the user adds to it, and the model continues it."""

    def __init__(
        self,
        model: LongNetLM,
        vocabulary: Vocabulary,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        is_long: bool,
    ) -> None:
        from dilated_models.longnet.generation_cache import GenerationCache

        self._model, self._vocabulary = model, vocabulary
        self._max_new_tokens, self._sampling, self._seed = max_new_tokens, sampling, seed
        # Of a text of one turn the length is known, and its cache may be smaller.
        self._cache = GenerationCache(model) if is_long else None
        self._newest: list[int] = []  # the last token, which the cache does not hold yet
        self._output = TextOutput()

    @property
    def has_text(self) -> bool:
        """Whether there is a token to continue from."""
        return bool(self._newest)

    def continue_with(self, text: bytes, *, is_line: bool) -> None:
        """Add a text, and write its continuation as it is made.

        Args:
            text: What comes next.
            is_line: Whether the text was typed, so that only the continuation is written.
        """
        from dilated_models.longnet.generation import generate as sample
        from dilated_models.longnet.generation import seeds_from
        from dilated_models.text.pieces import text_pieces

        tokens = [*self._newest, *self._vocabulary.encode(text.decode("utf-8", "surrogateescape"))]
        drawn = sample(
            self._model,
            tokens,
            max_new_tokens=self._max_new_tokens,
            **self._sampling._asdict(),
            seed=self._seed,
            cache=self._cache,
        )
        try:
            if not is_line:
                self._output.write(text)
            for piece in text_pieces(self._vocabulary, tokens, self._noted(drawn)):
                self._output.write(piece)
        except KeyboardInterrupt:
            self._output.end(has_newline=True)  # the command ends with code 130
            raise
        self._output.end(has_newline=is_line)
        self._seed = seeds_from(self._seed, 2)[1]

    def _noted(self, drawn: Iterator[int]) -> Iterator[int]:
        for token in drawn:
            self._newest = [token]
            yield token
