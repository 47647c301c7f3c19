"""What `dilated train` prints before its first step and after its last one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dilated_models.cli.progress import printable
from dilated_models.cli.shell import command, quoted

if TYPE_CHECKING:
    from rich.console import Console

    from dilated_models.config import LongNetConfig
    from dilated_models.training.deepspeed import DeepSpeedConfig
    from dilated_models.training.loop import TrainingState
    from dilated_models.training.run import Report, Run


def introduce(
    console: Console, run: Run, state: TrainingState, file: DeepSpeedConfig | None
) -> None:
    """Print what is about to be trained, on what, and where the files go."""
    from dilated_models.longnet.saving import CONFIG_FILE
    from dilated_models.training.borders import border_note

    step, over = state.step, state.over
    num_parameters = sum(p.numel() for p in state.model.parameters())
    split, model, training = run.split, run.model, run.training
    source = "the Python standard library" if run.text is None else " ".join(map(quoted, run.text))
    megabytes = [
        sum(piece.num_bytes for piece in side) / 1e6 for side in (split.train, split.validation)
    ]
    lines = [
        f"{num_parameters / 1e6:.2f}M parameters, {model.num_decoder_layers} layers, "
        f"{_attention(model)}, {training.dtype} on {run.device}"
        + ("" if over is None else f"; {over}"),
        f"text: {source}: {megabytes[0]:.2f} MB to train, {megabytes[1]:.2f} MB to validate"
        + (f"; {split.skipped} binary files skipped" if split.skipped else ""),
        f"{training.steps} steps of {training.batch_size} rows of {training.seq_len} tokens"
        + (f", continuing after step {step}" if 0 < step < training.steps else "")
        + (", all done before: give more --steps to train on" if step == training.steps else "")
        + f"; writing to {quoted(run.folder)}",
    ]
    if run.is_edited:
        lines.append(
            f"note: {quoted(run.folder / CONFIG_FILE)} was edited by hand, so from here on this is "
            f"not the run that began; it goes on with the numbers that are there now"
        )
    if file is not None and file.without_effect:
        lines.append(f"note: without effect here: {', '.join(file.without_effect)}")
    note = border_note(model.pattern, training.seq_len) if model.has_branches else None
    if note is not None and not model.local_window:
        lines.append(f"note: {note}")
    console.print("\n".join(lines))


def _attention(model: LongNetConfig) -> str:
    """The attention of a model, for its first line."""
    if not model.has_branches:
        options = ", ".join(f"{name}={value}" for name, value in model.attention_options)
        return f"{model.attention_kind} attention" + (f" ({options})" if options else "")
    branches = ", ".join(f"{w}/{r}" for w, r in model.pattern.branches)
    window = f", window {model.local_window}" if model.local_window else ""
    return f"segments/rates {branches}{window}"


def conclude(console: Console, run: Run, report: Report, seconds: float) -> None:
    """Print the report, and where the files are."""
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
        printable(f"{report.prompt}|{report.sample}"),
        "",
        f"{quoted(run.folder)}: model.safetensors, config.json, metrics.jsonl, loss.png, "
        f"and a checkpoint; {seconds:.0f} s in all",
        f"more: {command('generate', '--checkpoint', run.folder, '--prompt', 'def ')}",
    ]
    console.print("\n".join(lines))
