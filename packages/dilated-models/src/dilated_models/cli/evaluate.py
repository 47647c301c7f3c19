"""`dilated evaluate`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from dilated_models.cli.options import (
    CheckpointOption,
    DeviceOption,
    DtypeOption,
    MoreTextArgument,
    TextOption,
    all_text,
)


def evaluate(
    checkpoint: CheckpointOption,
    text: TextOption = None,
    more_text: MoreTextArgument = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Window length in tokens; the trained one if left out.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Score this many tokens; all if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows scored at a time.")] = 8,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Bits per byte of a text, overall and with growing context."""
    with tempfile.TemporaryDirectory(prefix="dilated-") as cache:
        paths = all_text(text, more_text)
        if paths is None:
            raise ValueError("there is no text; it must be named, so add --text PATH.")
        import torch

        from dilated_models.cli.progress import ScoringProgress, plain_console
        from dilated_models.longnet.saving import load_model, load_vocabulary, read_config
        from dilated_models.text.files import text_files
        from dilated_models.text.streams import ByteStream
        from dilated_models.text.vocabulary import TokenizerVocabulary, token_cache
        from dilated_models.training.config import TrainingConfig
        from dilated_models.training.devices import choose_device, choose_dtype
        from dilated_models.training.evaluation import evaluate as score
        from dilated_models.training.gain import measure_gain
        from dilated_models.training.report import gain_lines

        where = choose_device(device)
        autocast = torch.bfloat16 if choose_dtype(dtype, where) == "bfloat16" else None
        model = load_model(checkpoint, device=where)
        vocabulary = load_vocabulary(checkpoint)
        pieces, _ = text_files(paths)
        stream = ByteStream(pieces)
        if isinstance(vocabulary, TokenizerVocabulary):
            stream = token_cache(stream, pieces, vocabulary, Path(cache))
        if seq_len is None:
            training = read_config(checkpoint).get("training")
            if training is None:
                raise ValueError(
                    f"{str(checkpoint)!r} was not trained by dilated train; the length of windows "
                    f"must be given, so add --seq-len."
                )
            seq_len = TrainingConfig.from_dict(training).seq_len
        with ScoringProgress(plain_console(stderr=True)) as progress:
            result = score(
                model,
                stream,
                seq_len=seq_len,
                max_tokens=max_tokens,
                batch_size=batch_size,
                autocast=autocast,
                before_batch=progress.scored,
            )
        with ScoringProgress(plain_console(stderr=True)) as progress:
            gain = measure_gain(
                model,
                stream,
                seq_len=seq_len,
                max_tokens=max_tokens,
                autocast=autocast,
                before_batch=progress.scored,
            )
    typer.echo(
        f"{result.bits_per_byte:.4f} bits per byte over {result.num_bytes} bytes "
        f"({result.num_tokens} tokens, {result.bits_per_token:.4f} bits each)"
    )
    typer.echo("\n".join(gain_lines(gain)))
