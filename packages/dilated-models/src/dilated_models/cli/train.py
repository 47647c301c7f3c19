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
    model_fields,
    named_values,
)
from dilated_models.cli.train_processes import Parallel, train_with

if TYPE_CHECKING:
    from dilated_models.training.ranks import Ranks
    from dilated_models.training.run import Run

_RUNS = Path("runs")
_COMPILER = "inductor"


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
    attention_kind: Annotated[
        str | None,
        typer.Option(help="dilated, block_sparse, block_sparse_adaptive, moba or nsa."),
    ] = None,
    attention_options: Annotated[
        str | None,
        typer.Option(metavar="NAME=VALUE,...", help="Options of --attention-kind, as block_size."),
    ] = None,
    local_window: Annotated[
        int | None, typer.Option(help="Tokens before each that it also sees; 0 for none.")
    ] = None,
    d_model: Annotated[int | None, typer.Option(help="Width of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    kv_heads: Annotated[
        int | None, typer.Option(help="Heads of keys and values; as many as --heads if left out.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    feed_forward: Annotated[int | None, typer.Option(help="Width of the feed-forward.")] = None,
    key_conv: Annotated[
        int | None,
        typer.Option(help="Width of a convolution before attention, not of LongNet; 0 for none."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="Probability of dropout.")] = None,
    model_options: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE,...", help="Other fields of LongNetConfig, as positions=alibi."
        ),
    ] = None,
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
    schedule: Annotated[
        str | None, typer.Option(metavar="cosine|polynomial", help="Learning rate after warm-up.")
    ] = None,
    schedule_power: Annotated[
        float | None, typer.Option(help="Exponent of the polynomial schedule; 1 is a line.")
    ] = None,
    gradient_clip: Annotated[
        float | None, typer.Option(help="Largest gradient norm; 0 for any.")
    ] = None,
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
    sample_every: Annotated[
        int | None, typer.Option(help="Steps between samples and losses by context; 0 for none.")
    ] = None,
    on_out_of_memory: Annotated[
        str | None,
        typer.Option(
            metavar="stop|halve|checkpoint",
            help="Where a step does not fit: stop, compute in more parts, or recompute blocks.",
        ),
    ] = None,
    tensorboard: Annotated[
        bool | None, typer.Option(help="Write metrics for TensorBoard, too.")
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile each block with torch.compile.")
    ] = False,
    cp: Annotated[
        int, typer.Option("--cp", help="Processes that share the positions of each row.")
    ] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Spread weights and optimiser over the processes.")
    ] = False,
    deepspeed: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take the options in a configuration of DeepSpeed."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Longest wait for another process.")
    ] = 600.0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:
    """Train a LongNet on text; without --text, on the Python standard library's sources.

    Ctrl-C or SIGTERM saves the run and exits with code 130 or 143; --resume continues it. On
    several processes: torchrun --nproc-per-node N -m dilated_models.train, with the same options.
    """
    began = time.monotonic()
    from dilated_core.checks import check_integer, check_number

    from dilated_models.training.deepspeed import merged_with, read_deepspeed

    paths = all_text(text, more_text)
    model = _given(
        d_model=d_model,
        nhead=heads,
        num_kv_heads=kv_heads,
        num_decoder_layers=layers,
        dim_feedforward=feed_forward,
        segment_lengths=integers("--segment-lengths", segment_lengths),
        dilation_rates=integers("--dilation-rates", dilation_rates),
        attention_kind=attention_kind,
        attention_options=named_values("--attention-options", attention_options),
        local_window=local_window,
        key_conv=key_conv,
        dropout=dropout,
        activation_checkpointing=checkpoint_activations,
        backend=backend,
        **model_fields("--model-options", model_options),
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
        schedule=schedule,
        schedule_power=schedule_power,
        gradient_clip=gradient_clip,
        weight_decay=weight_decay,
        seed=seed,
        validate_every=validate_every,
        validation_tokens=validation_tokens,
        final_validation_tokens=final_validation_tokens,
    )
    movable = _given(
        steps=steps,
        checkpoint_every=checkpoint_every,
        sample_every=sample_every,
        on_out_of_memory=on_out_of_memory,
        tensorboard=tensorboard,
    )
    if resume:
        fixed = model | training | _given(preset=preset, tokenizer=tokenizer, text=paths)
        fixed |= _given(deepspeed=deepspeed)
        if dtype != "auto":
            fixed["dtype"] = dtype
        if fixed:
            names = ", ".join(dict.fromkeys(option_of(name) for name in sorted(fixed)))
            raise ValueError(f"--resume continues a run with its own options; leave out {names}.")
    check_integer("cp", cp, at_least=1)
    check_number("timeout", timeout, at_least=1, at_most=10_000_000)  # C counts milliseconds

    file = None if deepspeed is None else read_deepspeed(deepspeed)
    parallel = Parallel(
        device=device,
        cp=cp,
        fsdp=fsdp,
        file=file,
        timeout_s=timeout,
        compiler=_COMPILER if compiled else None,
    )

    def make(ranks: Ranks) -> tuple[Run, bool]:
        """The run, and whether it is new."""
        from dilated_models.training.devices import choose_dtype
        from dilated_models.training.setup import new_run, resumed_run

        begun = ranks.begun_run()
        if begun is not None or resume:
            folder = begun if begun is not None else out or _newest_run()
            return resumed_run(folder, device=ranks.device, training=movable), False
        numbers = training | movable
        if file is not None:
            numbers = merged_with(file.training_over(ranks.size // cp), numbers, dtype)
        numbers.setdefault("dtype", choose_dtype(dtype, ranks.device))
        run = new_run(
            folder=out or _RUNS / time.strftime("%Y%m%d-%H%M%S"),
            preset=preset or "tiny",
            text=paths,
            tokenizer=tokenizer or "bytes",
            device=ranks.device,
            model=model,
            training=numbers,
        )
        return run, True

    train_with(make, parallel, began)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _newest_run() -> Path:
    files = [*_RUNS.glob("*/checkpoint.pt"), *_RUNS.glob("*/checkpoint-*/manifest.json")]
    if not files:
        raise FileNotFoundError(
            f"there is no run in {str(_RUNS)!r} to resume; name its folder with --out DIR."
        )
    newest = max(files, key=lambda path: path.stat().st_mtime)
    return _RUNS / newest.relative_to(_RUNS).parts[0]
