"""Options that several commands share, and functions that read their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

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

# Fields of `LongNetConfig` for which a command has no option of their own.
MODEL_FIELDS = (
    *("num_encoder_layers", "drop_path_rate", "activation", "layer_norm_eps", "head_offsets"),
    *("padding", "positions", "xpos_scale_base", "tie_embeddings", "scale_embedding"),
    "final_layer_norm",
)


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


def named_values(option: str, value: str | None) -> dict[str, Any] | None:
    """Read `block_size=64,sparsity_ratio=0.1`: numbers, true, false, none, or words.

    Raises:
        ValueError: If a part has no name or no value, or a name is there twice.
    """
    if value is None:
        return None
    found: dict[str, Any] = {}
    for part in value.split(","):
        name, sign, text = (x.strip() for x in part.partition("="))
        if not name or not sign or not text or name in found:
            raise ValueError(
                f"{option} is {value!r}; it must be names and values with commas between them, "
                f"each name once, such as block_size=64,sparsity_ratio=0.1."
            )
        found[name] = _value(text)
    return found


def model_fields(option: str, value: str | None) -> dict[str, Any]:
    """Read `num_encoder_layers=2,positions=alibi`: values of `MODEL_FIELDS`.

    Raises:
        ValueError: As `named_values`; or if a name is another, or a value is none.
    """
    found = named_values(option, value) or {}
    for name, given in found.items():
        if name not in MODEL_FIELDS:
            raise ValueError(
                f"{option} has the name {name!r}; it must be one of {', '.join(MODEL_FIELDS)}, as "
                f"all other numbers of a model have options of their own."
            )
        if given is None:
            raise ValueError(
                f"{option} has {name}=none; it must have a value, so leave {name} out."
            )
    return found


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
