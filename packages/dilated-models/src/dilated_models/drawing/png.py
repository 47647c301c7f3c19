"""Figures without a display, written as PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dilated_core.atomic_write import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, that leaves pyplot's global state alone."""
    # Imported here: matplotlib is part of the extra `cli`.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure; `path` is whole or unchanged."""
    with write_atomically(path) as part:
        figure.savefig(part, dpi=130, format="png")
