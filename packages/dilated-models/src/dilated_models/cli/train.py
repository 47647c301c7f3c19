"""`dilated train`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dilated_models.cli.errors import option_of
from dilated_models.cli.options import (
    DeviceOption,
    DtypeOption,
    MoreTextArgument,
    TextOption,
    all_text,
    integers,
)
from dilated_models.cli.shell import command, quoted

if TYPE_CHECKING:
    from rich.console import Console

    from dilated_models.training.loop import TrainingState
    from dilated_models.training.run import Report, Run, Text

_RUNS = Path("runs")


def train(
    text: TextOption = None,
    more_text: MoreTextArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the run; runs/<date>-<time> if left out."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or the newest in runs/.")
    ] = False,
    preset: Annotated[
        str | None,
        typer.Option(help="tiny (minutes on two CPU cores), small (one GPU), base (the paper's)."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows per step.")] = None,
    accumulation: Annotated[
        int | None, typer.Option(help="Compute a batch in this many parts, to save memory.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Row length and longest window, in tokens.")
    ] = None,
    first_seq_len: Annotated[
        int | None, typer.Option(help="Longest window of the first steps, which then doubles.")
    ] = None,
    growth: Annotated[
        float | None, typer.Option(help="Share of the steps after which windows have --seq-len.")
    ] = None,
    warm_up_copies: Annotated[
        float | None,
        typer.Option(help="Share of the steps that first train on edited copies; 0 for none."),
    ] = None,
    segment_lengths: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="Segment length of each branch.")
    ] = None,
    dilation_rates: Annotated[
        str | None, typer.Option(metavar="R,R,...", help="Dilation rate of each branch.")
    ] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    feed_forward: Annotated[int | None, typer.Option(help="Width of the feed-forward.")] = None,
    key_conv: Annotated[
        int | None,
        typer.Option(help="Width of a convolution before attention, not of LongNet; 0 for none."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Probability of dropout.")] = None,
    checkpoint_activations: Annotated[
        bool | None,
        typer.Option(help="Recompute blocks in the backward pass, to save memory."),
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="Attention backend: auto, or a name dilated info lists.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="bytes|FILE", help="bytes, or a tokenizer.json.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="AdamW's weight decay.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of initialisation, data order and dropout.")
    ] = None,
    validate_every: Annotated[int | None, typer.Option(help="Steps between validations.")] = None,
    validation_tokens: Annotated[
        int | None, typer.Option(help="Tokens scored in a validation during training.")
    ] = None,
    final_validation_tokens: Annotated[
        int | None, typer.Option(help="Tokens scored at the end.")
    ] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Train a LongNet on text; without --text, on the Python standard library's sources.

    Ctrl-C or SIGTERM saves the run and exits with code 130 or 143; --resume continues it.
    """
    began = time.monotonic()
    from dilated_models.cli.progress import plain_console
    from dilated_models.training.devices import choose_device, choose_dtype
    from dilated_models.training.folder import hold
    from dilated_models.training.setup import new_run, resumed_run

    where = choose_device(device)
    chosen_dtype = choose_dtype(dtype, where)
    paths = all_text(text, more_text)
    model = _given(
        d_model=d_model,
        nhead=heads,
        num_decoder_layers=layers,
        dim_feedforward=feed_forward,
        segment_lengths=integers("--segment-lengths", segment_lengths),
        dilation_rates=integers("--dilation-rates", dilation_rates),
        key_conv=key_conv,
        dropout=dropout,
        activation_checkpointing=checkpoint_activations,
        backend=backend,
    )
    training = _given(
        batch_size=batch_size,
        accumulation=accumulation,
        seq_len=seq_len,
        first_seq_len=first_seq_len,
        growth=growth,
        warmup_copies=warm_up_copies,
        learning_rate=lr,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        seed=seed,
        validate_every=validate_every,
        validation_tokens=validation_tokens,
        final_validation_tokens=final_validation_tokens,
    )
    movable = _given(steps=steps, checkpoint_every=checkpoint_every)
    if resume:
        fixed = model | training | _given(preset=preset, tokenizer=tokenizer, text=paths)
        if dtype != "auto":
            fixed["dtype"] = dtype
        if fixed:
            names = ", ".join(option_of(name) for name in sorted(fixed))
            raise ValueError(f"--resume continues a run with its own options; leave out {names}.")
        run = resumed_run(out or _newest_run(), device=where, training=movable)
    else:
        run = new_run(
            folder=out or _RUNS / time.strftime("%Y%m%d-%H%M%S"),
            preset=preset or "tiny",
            text=paths,
            tokenizer=tokenizer or "bytes",
            device=where,
            model=model,
            training=training | movable | {"dtype": chosen_dtype},
        )
    console = plain_console()
    with hold(run.folder, is_new=not resume):
        report = _run(console, run, resume=resume)
    _conclude(console, run, report, time.monotonic() - began)


def _run(console: Console, run: Run, *, resume: bool) -> Report:
    """Build the model, train it and show the progress; every end names the way to go on."""
    from dilated_models.training.loop import CHECKPOINT_FILE
    from dilated_models.training.run import build, open_text
    from dilated_models.training.stopping import Stopped

    go_on = f"continue with: {command('train', '--resume', '--out', run.folder)}"
    is_whole = not resume  # a checkpoint of an earlier process may be damaged
    try:
        state = build(run)
        if resume:
            state.restore(run.folder, run_id=run.run_id)
            is_whole = True
        text = open_text(run, console.print)
        _introduce(console, run, state.step, sum(p.numel() for p in state.model.parameters()))
        return _execute(console, run, state, text)
    except Stopped as stopped:
        console.print(f"{stopped}; everything is saved; {go_on}")
        raise typer.Exit(stopped.exit_code) from None
    except (Exception, KeyboardInterrupt) as error:
        if is_whole and (run.folder / CHECKPOINT_FILE).exists():
            error.add_note(f"the last checkpoint is whole; {go_on}")
        raise


def _execute(console: Console, run: Run, state: TrainingState, text: Text) -> Report:
    from dilated_models.cli.progress import TrainingProgress
    from dilated_models.longnet.size import available_bytes
    from dilated_models.training.run import execute, peak_memory_bytes
    from dilated_models.training.stopping import StopSignals

    progress = TrainingProgress(
        console,
        steps=run.training.steps,
        done=state.step,
        times=state.times,
        scorable=len(text.validation),
        peak_memory_bytes=lambda: peak_memory_bytes(run.device),
        available_bytes=lambda: available_bytes(run.device),
    )
    with StopSignals() as signals, progress:
        return execute(run, text, state, progress, signals)


def _printable(text: str) -> str:
    """The text without control characters, which would command a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _newest_run() -> Path:
    runs = sorted(_RUNS.glob("*/checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise FileNotFoundError(
            f"there is no run in {str(_RUNS)!r} to resume; name its folder with --out DIR."
        )
    return runs[-1].parent


def _introduce(console: Console, run: Run, step: int, num_parameters: int) -> None:
    from dilated_models.training.borders import border_note

    split, model, training = run.split, run.model, run.training
    source = "the Python standard library" if run.text is None else " ".join(map(quoted, run.text))
    branches = ", ".join(f"{w}/{r}" for w, r in model.pattern.branches)
    megabytes = [
        sum(piece.num_bytes for piece in side) / 1e6 for side in (split.train, split.validation)
    ]
    lines = [
        f"{num_parameters / 1e6:.2f}M parameters, {model.num_decoder_layers} layers, "
        f"segments/rates {branches}, {training.dtype} on {run.device}",
        f"text: {source}: {megabytes[0]:.2f} MB to train, {megabytes[1]:.2f} MB to validate"
        + (f"; {split.skipped} binary files skipped" if split.skipped else ""),
        f"{training.steps} steps of {training.batch_size} rows of {training.seq_len} tokens"
        + (f", continuing after step {step}" if step else "")
        + f"; writing to {quoted(run.folder)}",
    ]
    note = border_note(model.pattern, training.seq_len)
    if note is not None and not model.local_window:
        lines.append(f"note: {note}")
    console.print("\n".join(lines))


def _conclude(console: Console, run: Run, report: Report, seconds: float) -> None:
    from dilated_models.training.report import gain_lines

    result = report.evaluation
    lines = [
        "",
        f"validation: {result.bits_per_byte:.3f} bits per byte over {result.num_bytes} bytes; "
        f"xz -9 on the same text, {report.xz_bytes} bytes: {report.xz_bits_per_byte:.3f}",
        "",
        *gain_lines(report.gain),
        "",
        "sample: the beginning of the validation text, a bar, and text by the model:",
        _printable(f"{report.prompt}|{report.sample}"),
        "",
        f"{quoted(run.folder)}: model.safetensors, config.json, metrics.jsonl, loss.png, "
        f"checkpoint.pt; {seconds:.0f} s in all",
        f"more: {command('generate', '--checkpoint', run.folder, '--prompt', 'def ')}",
    ]
    console.print("\n".join(lines))
