"""Parts of a run's report: loss curve, comparison with xz, loss by length of context."""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dilated_core.atomic_write import write_atomically

from dilated_models.training.evaluation import Evaluation

PLOT_FILE = "loss.png"
# xz -9 takes seconds per MiB, and 700 MB of memory for a long input.
_MOST_XZ_BYTES = 8 << 20
_SMOOTHED_STEPS = 20


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
    folder: Path, records: Sequence[dict[str, Any]], *, xz: float | None = None
) -> None:
    """Draw `loss.png`: training and validation bits per byte over steps.

    Args:
        folder: Of the run.
        records: As in `metrics.jsonl`.
        xz: Bits per byte of `xz -9`, drawn as a horizontal line.
    """
    # Imported here: matplotlib is part of the extra `cli`. Without pyplot, a Figure needs no
    # display and changes no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [(r["step"], r["bits_per_byte"]) for r in records if r["kind"] == "step"]
    validations = [(r["step"], r["bits_per_byte"]) for r in records if r["kind"] == "validation"]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        numbers, losses = zip(*steps, strict=True)
        axes.plot(numbers, losses, color="tab:blue", alpha=0.25, linewidth=1)
        axes.plot(numbers, _smoothed(losses), color="tab:blue", label="training")
    if validations:
        axes.plot(*zip(*validations, strict=True), "o-", color="tab:orange", label="validation")
    if xz is not None:
        axes.axhline(xz, color="tab:gray", linestyle="--", label="xz -9 (validation bytes)")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.grid(alpha=0.3)
    if steps or validations or xz is not None:
        axes.legend()
    with write_atomically(folder / PLOT_FILE) as part:
        figure.savefig(part, dpi=120, format="png")


def context_lines(evaluation: Evaluation) -> list[str]:
    """A table of bits per byte by length of context, shortest first."""
    lines = [f"{'tokens of context':>18}  {'bits per byte':>13}"]
    for bucket in evaluation.by_context:
        seen = f"{bucket.shortest}-{bucket.longest}"
        lines.append(f"{seen:>18}  {bucket.bits_per_byte:>13.3f}")
    return lines


def _smoothed(losses: Sequence[float]) -> list[float]:
    """Mean over the last twenty steps."""
    means: list[float] = []
    for i in range(len(losses)):
        window = losses[max(0, i + 1 - _SMOOTHED_STEPS) : i + 1]
        means.append(sum(window) / len(window))
    return means
