"""`dilated generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from dilated_models.cli.errors import user_errors
from dilated_models.cli.options import CheckpointOption, DeviceOption


def generate(
    checkpoint: CheckpointOption,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Number of tokens to write.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1 sharpens, above 1 flattens; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among this many likeliest tokens.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Continue a text with a trained model."""
    with user_errors():
        from dilated_models.longnet.generation import generate as sample
        from dilated_models.longnet.saving import load_model, load_vocabulary
        from dilated_models.training.devices import choose_device

        model = load_model(checkpoint, device=choose_device(device))
        vocabulary = load_vocabulary(checkpoint)
        tokens = vocabulary.encode(prompt)
        continuation = sample(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            seed=seed,
        )
    typer.echo(vocabulary.decode([*tokens, *continuation]))
