"""`dilated plan`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from dilated_models.cli.options import integers

if TYPE_CHECKING:
    from dilated_models.planning.hardware import Hardware

_MEASURED = "this-machine"


def plan(
    preset: Annotated[
        str | None, typer.Option(help="Model and numbers to start from: tiny, small, base.")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Plan for the model of this --out folder of a run."),
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="training; forward (scores of whole rows); prefill (a prompt into a cache); "
            "decoding (one more token)."
        ),
    ] = "training",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a row; in decoding, of the context.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Rows of a step, of all devices together.")
    ] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Compute a batch in this many parts, one after another.")
    ] = None,
    num_tokens: Annotated[int | None, typer.Option(help="Size of the vocabulary.")] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    feed_forward: Annotated[int | None, typer.Option(help="Width of the feed-forward.")] = None,
    segment_lengths: Annotated[
        str | None,
        typer.Option(
            metavar="W,W,...|auto",
            help="Segment length of each branch; auto: branches for this length.",
        ),
    ] = None,
    dilation_rates: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="Dilation rate of each branch.")
    ] = None,
    checkpoint_activations: Annotated[
        bool | None, typer.Option(help="Recompute blocks in the backward pass.")
    ] = None,
    whole_logits: Annotated[
        bool,
        typer.Option("--whole-logits", help="For a loss of all logits at once, not in chunks."),
    ] = False,
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    dtype: Annotated[
        str | None, typer.Option(help="Of products: float32, bfloat16, float16 (not in training).")
    ] = None,
    hardware: Annotated[
        str,
        typer.Option(
            metavar="NAME|FILE",
            help="A name that --list-hardware shows, this-machine (measures it), or a file that "
            "--calibrate wrote.",
        ),
    ] = "h100-sxm",
    devices: Annotated[int, typer.Option(help="Number of devices: dp x cp.")] = 1,
    cp: Annotated[int, typer.Option(help="Ranks that share a sequence.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Spread parameters and optimiser over all ranks.")
    ] = False,
    layout: Annotated[str, typer.Option(help="With --cp: contiguous or zigzag.")] = "contiguous",
    exchange: Annotated[
        str, typer.Option(help="With --cp: auto, ring, all_gather, all_to_all.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a page with plots.")
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Measure this machine into a .json file, and stop."),
    ] = None,
    list_hardware: Annotated[
        bool, typer.Option("--list-hardware", help="Show the known hardware, and stop.")
    ] = False,
) -> None:
    """Memory, FLOPs, bytes and time of a model on some devices, and what makes it fit.

    Nothing is built or run. Numbers are those of the rank that has most to do.
    """
    if list_hardware:
        typer.echo(_hardware_table())
        return
    for option, file, suffix in (("--calibrate", calibrate, ".json"), ("--html", html, ".html")):
        if file is not None:
            _check_file(option, file, suffix)
    if calibrate is not None:
        from dilated_core.atomic_write import write_atomically

        with write_atomically(calibrate) as part:
            part.write_text(_measured().to_json() + "\n", "utf-8")
        typer.echo(f"wrote {calibrate}")
        return
    if preset is not None and checkpoint is not None:
        raise ValueError("--preset and --checkpoint are both given; leave one out.")
    from dilated_models.planning.plan import plan as make_plan

    model = {
        "num_tokens": num_tokens,
        "d_model": d_model,
        "nhead": heads,
        "num_decoder_layers": layers,
        "dim_feedforward": feed_forward,
        "activation_checkpointing": checkpoint_activations,
    }
    config, numbers = _start(
        preset,
        checkpoint,
        {name: value for name, value in model.items() if value is not None},
        branches=(segment_lengths, dilation_rates),
        seq_len=seq_len,
    )
    rows, parts = _rows(numbers, mode, batch_size, accumulation, dp=devices // max(1, cp))
    device = _measured() if hardware == _MEASURED else hardware
    found = make_plan(
        config,
        hardware=device,
        mode=mode,
        seq_len=numbers["seq_len"],
        batch_size=rows,
        accumulation=parts,
        dtype=dtype or _dtype(device),
        devices=devices,
        cp=cp,
        fsdp=fsdp,
        layout=layout,
        exchange=exchange,
        chunked_loss=not whole_logits,
        optimizer=optimizer,
    )
    if html is not None:
        found.to_html(html)
    typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else str(found))


def _start(
    preset: str | None,
    checkpoint: Path | None,
    model: dict[str, Any],
    *,
    branches: tuple[str | None, str | None],
    seq_len: int | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of the model, and the numbers of its training."""
    from dilated_core import select_segments
    from dilated_core.checks import check_choice, check_integer

    from dilated_models.training.config import PRESETS

    if seq_len is not None:
        check_integer("seq_len", seq_len, at_least=1)
    if checkpoint is not None:
        from dilated_models.longnet.saving import read_config

        content = read_config(checkpoint)
        if content.get("architecture") == "LongNet":
            raise ValueError(
                f"--checkpoint is {str(checkpoint)!r}, which holds a LongNet of two sequences; "
                f"this command plans models of one, so call dilated_models.plan with memory_len."
            )
        fields, numbers = dict(content["model"]), dict(content.get("training", {}))
    else:
        check_choice("preset", preset or "base", tuple(PRESETS))
        chosen = PRESETS[preset or "base"]
        fields, numbers = {"num_tokens": 256, **chosen.model}, dict(chosen.training)
    usual = list(cast("Sequence[int]", fields["segment_lengths"]))
    length: int = numbers.get("seq_len", max(usual))
    numbers["seq_len"] = length if seq_len is None else seq_len
    fields |= model
    lengths, rates = branches
    if lengths == "auto":
        if rates is not None:
            raise ValueError(
                f"--dilation-rates is {rates!r} and --segment-lengths auto, which chooses both; "
                f"leave it out."
            )
        segments = select_segments(numbers["seq_len"], num_heads=fields["nhead"])
        fields["segment_lengths"] = segments.segment_lengths
        fields["dilation_rates"] = segments.dilation_rates
    else:
        if (given := integers("--segment-lengths", lengths)) is not None:
            fields["segment_lengths"] = given
        elif checkpoint is None and numbers["seq_len"] != length:  # as dilated train scales them
            fields["segment_lengths"] = [max(1, w * numbers["seq_len"] // length) for w in usual]
        if (given := integers("--dilation-rates", rates)) is not None:
            fields["dilation_rates"] = given
    return fields, numbers


def _rows(
    numbers: dict[str, Any], mode: str, batch_size: int | None, accumulation: int | None, *, dp: int
) -> tuple[int, int]:
    """Rows of a batch and parts of it; those of the training, as far as the devices allow."""
    dp = max(1, dp)
    if mode != "training":
        return dp if batch_size is None else batch_size, accumulation or 1
    usual: int = numbers.get("batch_size", dp)
    parts: int = numbers.get("accumulation", 1)
    rows = -(-usual // dp) * dp if batch_size is None else batch_size
    if accumulation is not None:
        return rows, accumulation
    # As many rows of a rank at once as in the training, or fewer.
    parts = max(1, rows // dp // max(1, usual // parts))
    while rows % (dp * parts) and parts > 1:
        parts -= 1
    return rows, parts


def _dtype(device: str | Hardware) -> str:
    """The dtype that training takes there by itself."""
    from dilated_models.planning.hardware import Hardware, hardware_named

    known = device if isinstance(device, Hardware) else hardware_named(device)
    return "bfloat16" if "bfloat16" in known.products else "float32"


def _measured() -> Hardware:
    from dilated_models.planning.calibration import calibrate
    from dilated_models.training.devices import choose_device

    typer.echo("measuring this machine; about 15 seconds", err=True)
    device = choose_device("auto")
    dtypes = ("float32", "bfloat16") if device.type == "cuda" else ("float32",)
    return calibrate(device, dtypes=dtypes)


def _check_file(option: str, file: Path, suffix: str) -> None:
    if file.suffix != suffix or file.is_dir() or not file.parent.is_dir():
        raise ValueError(
            f"{option} is {str(file)!r}; it must be a {suffix} file in a folder that exists."
        )


def _hardware_table() -> str:
    from dilated_models.planning.hardware import DATA_SHEETS

    lines = [f"{'name':<12} {'memory':>7} {'memory GB/s':>12}  TFLOP/s by dtype"]
    for name, sheet in DATA_SHEETS.items():
        rates = ", ".join(f"{dtype} {tflops:g}" for dtype, tflops in sheet.tflops.items())
        lines.append(f"{name:<12} {sheet.memory_gb:>4g} GB {sheet.memory_gb_per_s:>12,g}  {rates}")
        lines += [f"{'':<14}{source}" for source in sheet.sources]
    return "\n".join(lines)
