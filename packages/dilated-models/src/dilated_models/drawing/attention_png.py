"""Attention of a prompt as PNG: a strip per layer and head, rows are queries and columns keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dilated_models.drawing.cells import Cell, escaped
from dilated_models.drawing.png import new_figure, save_png
from dilated_models.drawing.prompt_attention import PromptAttention

MOST_STRIPS = 96
_MOST_COLUMNS = 800  # more than a strip has pixels: neighbours then share a column
_MOST_LABELS = 48


def draw_attention_png(
    attention: PromptAttention, cells: Sequence[Cell], layers: Sequence[int], path: Path
) -> None:
    """Write the PNG.

    Args:
        attention: Of the model.
        cells: Of the prompt.
        layers: Indices of the layers to draw.
        path: Of the file.

    Raises:
        ValueError: If there are more than 96 strips.
    """
    from matplotlib.colors import PowerNorm

    H, N, _ = attention.positions.shape
    if len(layers) * H > MOST_STRIPS:
        raise ValueError(
            f"{len(layers)} layers of {H} heads are {len(layers) * H} strips; a PNG shows at most "
            f"{MOST_STRIPS}, so choose layers with --layers, or write an .html file."
        )
    seq_len = cells[-1].stop
    begin = int(attention.positions[attention.positions >= 0].min())
    columns = min(H, 4)
    lines_per_layer = -(-H // columns)
    lines = lines_per_layer * len(layers)
    figure = new_figure(4.2 * columns, lines * (0.75 + 0.17 * N) + 1.0)
    figure.suptitle(f"What the last {N} of {seq_len:,} tokens attended to")
    labels = {position: cell.text for cell in cells for position in range(cell.start, cell.stop)}
    axes: list[Any] = []
    # Square roots show the small probabilities beside the large ones.
    norm = PowerNorm(0.5, vmin=0, vmax=1)
    image = None
    for line, layer in enumerate(layers):
        for head in range(H):
            place = line * lines_per_layer * columns + head + 1
            strip = figure.add_subplot(lines, columns, place)
            strip.set_facecolor("#dee2e6")
            image = strip.imshow(
                _pixels(attention, layer, head, begin, seq_len),
                norm=norm,
                cmap="viridis",
                aspect="auto",
                interpolation="nearest",
                extent=(begin - 0.5, seq_len - 0.5, N - 0.5, -0.5),
            )
            strip.set_title(f"layer {layer}, head {head}", fontsize=9)
            strip.tick_params(labelsize=8)
            queries = [_label(labels[row]) for row in attention.rows]
            strip.set_yticks(range(N), queries if head % columns == 0 else [""] * N)
            if seq_len - begin <= _MOST_LABELS:
                seen = [cell for cell in cells if cell.start >= begin]
                turn = 90 if any(len(cell.text) > 1 for cell in seen) else 0
                texts = [_label(cell.text) for cell in seen]
                strip.set_xticks([cell.start for cell in seen], texts, rotation=turn)
            axes.append(strip)
    assert image is not None
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / lines), aspect=15, pad=0.01)
    bar.set_label("probability", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    figure.supxlabel("key: position in the prompt (grey: not seen)", fontsize=9)
    figure.supylabel("query", fontsize=9)
    save_png(figure, path)


def _pixels(
    attention: PromptAttention, layer: int, head: int, begin: int, end: int
) -> NDArray[np.float32]:
    """`(N, columns)`: the largest probability in each column, NaN where no key is seen."""
    columns = min(end - begin, _MOST_COLUMNS)
    pixels = np.full((len(attention.rows), columns), np.nan, np.float32)
    for i, (positions, probabilities) in enumerate(
        zip(attention.positions[head], attention.probabilities[layer, head], strict=True)
    ):
        seen = positions >= 0
        column = (positions[seen] - begin) * columns // (end - begin)
        np.fmax.at(pixels[i], column, probabilities[seen])
    return pixels


def _label(text: str) -> str:
    """A token beside an axis: with what the font lacks as escapes, and `$` begins no formula."""
    from matplotlib.font_manager import (
        FontProperties,
        findfont,  # pyright: ignore[reportUnknownVariableType]
        get_font,  # pyright: ignore[reportUnknownVariableType]
    )

    font: Any = get_font(findfont(FontProperties()))
    shown = "".join(c if font.get_char_index(ord(c)) else escaped(c) for c in text)
    return shown.replace(" ", "␣").replace("$", r"\$")
