"""Parts of a run's report: loss curve, comparison with xz, gain from context."""

from __future__ import annotations

import itertools
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dilated_core.atomic_write import write_atomically

from dilated_models.training.contextwise import ContextLoss
from dilated_models.training.gain import LOCAL_CONTEXT, Gain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOT_FILE = "loss.png"
# xz -9 takes seconds per MiB, and 700 MB of memory for a long input.
_MOST_XZ_BYTES = 8 << 20


def xz_bits_per_byte(text: bytes) -> tuple[float, int]:
    """Bits of `xz -9`'s output per byte of its input: a scale for a model's loss.

    Args:
        text: At most the first 8 MiB are compressed.

    Returns:
        Bits per byte, and the number of bytes compressed.

    Raises:
        ValueError: If there is no byte.
    """
    text = text[:_MOST_XZ_BYTES]
    if not text:
        raise ValueError("text is empty; it must hold at least one byte to compress.")
    return 8 * len(lzma.compress(text, preset=9)) / len(text), len(text)


def plot_losses(
    folder: Path,
    records: Sequence[dict[str, Any]],
    *,
    copied_steps: int = 0,
    xz: float | None = None,
    gain: Gain | None = None,
) -> None:
    """Draw `loss.png`: bits per byte over steps, and of the same targets over context.

    Args:
        folder: Of the run.
        records: As in `metrics.jsonl`.
        copied_steps: Number of steps, from the first, that trained on edited copies.
        xz: Bits per byte of `xz -9`, drawn as a horizontal line.
        gain: Drawn as a second panel.
    """
    # Imported here: matplotlib is part of the extra `cli`. Without pyplot, a Figure needs no
    # display and changes no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if gain is None else 13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 1 if gain is None else 2, squeeze=False)[0]
    # A name may hold bytes that are no UTF-8, and dollar signs, which matplotlib reads as formulas.
    name = folder.name.encode("utf-8", "replace").decode()
    figure.suptitle(f"{name}: bits per byte", parse_math=False)
    _plot_steps(axes[0], records, copied_steps, xz)
    if gain is not None:
        _plot_contexts(axes[1], gain)
    for panel in axes:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    with write_atomically(folder / PLOT_FILE) as part:
        figure.savefig(part, dpi=120, format="png")


def _plot_steps(
    axes: Axes, records: Sequence[dict[str, Any]], copied_steps: int, xz: float | None
) -> None:
    steps = [(r["step"], r["bits_per_byte"]) for r in records if r["kind"] == "step"]
    validations = [(r["step"], r["bits_per_byte"]) for r in records if r["kind"] == "validation"]
    if copied_steps:
        axes.axvspan(0, copied_steps, color="tab:gray", alpha=0.15, label="trains on copies")
    if steps:
        axes.plot(*zip(*steps, strict=True), color="tab:blue", alpha=0.25, linewidth=1)
    if means := means_between(steps, [step for step, _ in validations]):
        label = "training, mean since the last validation"
        axes.plot(*zip(*means, strict=True), "o-", color="tab:blue", label=label)
    if validations:
        axes.plot(*zip(*validations, strict=True), "o-", color="tab:orange", label="validation")
    if xz is not None:
        axes.axhline(xz, color="tab:gray", linestyle="--", label="xz -9 (validation text)")
    axes.set(title="Loss over training", xlabel="step", ylabel="bits per byte", ylim=(0, None))


def _plot_contexts(axes: Axes, gain: Gain) -> None:
    for label, losses in _columns(gain):
        contexts = [loss.context for loss in losses]
        axes.plot(contexts, [loss.bits_per_byte for loss in losses], "o-", label=label)
    local = {loss.context: loss.bits_per_byte for loss in gain.contextwise.by_context}
    if LOCAL_CONTEXT in local:
        label = f"this model, a local window of {LOCAL_CONTEXT}"
        axes.axhline(local[LOCAL_CONTEXT], color="tab:gray", linestyle="--", label=label)
    axes.set_xscale("log", base=2)
    contexts = list(local)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.set(
        title=f"Loss of the same {gain.contextwise.num_targets} targets",
        xlabel="tokens of context",
    )


def means_between(
    steps: Sequence[tuple[int, float]], ends: Sequence[int]
) -> list[tuple[int, float]]:
    """The mean of the values up to each end and after the one before.

    Training and validation then have as many points, at the same steps.

    Args:
        steps: Pairs (step, value), ascending.
        ends: Ascending; an end with no value before it has no mean.
    """
    means: list[tuple[int, float]] = []
    for before, end in itertools.pairwise([-1, *ends]):
        values = [value for step, value in steps if before < step <= end]
        if values:
            means.append((end, sum(values) / len(values)))
    return means


def _columns(gain: Gain) -> list[tuple[str, Sequence[ContextLoss]]]:
    columns: list[tuple[str, Sequence[ContextLoss]]] = [
        ("this model", gain.contextwise.by_context),
        ("trained on plain text only", gain.plain),
        ("counting predictor", gain.predictor),
    ]
    return [(label, losses) for label, losses in columns if losses]


def gain_lines(gain: Gain | None) -> list[str]:
    """Two tables: bits per byte with growing context, and by distance from a border."""
    if gain is None:
        return ["no document is long enough to tell what context gains"]
    columns, measured = _columns(gain), gain.contextwise
    values = [{x.context: x.bits_per_byte for x in losses} for _, losses in columns]
    lines = [
        f"bits per byte of the same {measured.num_targets} targets with growing context:",
        f"{'tokens of context':>18}" + "".join(f"  {label:>18}" for label, _ in columns),
    ]
    for loss in measured.by_context:
        cells = "".join(
            f"  {column[loss.context]:>{max(18, len(label))}.3f}"
            if loss.context in column
            else f"  {'':>{max(18, len(label))}}"
            for (label, _), column in zip(columns, values, strict=True)
        )
        lines.append(f"{loss.context:>18}{cells}")
    if any(loss.context == LOCAL_CONTEXT for loss in measured.by_context):
        lines.append(
            f"(the row of {LOCAL_CONTEXT} is this model with a local window of {LOCAL_CONTEXT})"
        )
    if len(measured.by_border) > 1:  # one row has nothing to be compared with
        lines += [
            "",
            "bits per byte by distance from the last border that cuts off all tokens before it:",
            f"{'tokens from border':>18}  {'text':>18}  {'edited copies':>18}",
        ]
        for row in measured.by_border:
            where = f"{row.nearest}-{row.farthest}" if row.farthest > row.nearest else row.nearest
            lines.append(
                f"{where:>18}  {row.bits_per_byte:>18.3f}  {row.copied_bits_per_byte:>18.3f}"
            )
    return lines
