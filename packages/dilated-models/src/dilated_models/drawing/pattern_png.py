"""A pattern as PNG: a square per head, rows are queries and columns keys."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dilated_models.drawing.pattern_keys import COLOURS, NONE, SEVERAL, PatternPicture
from dilated_models.drawing.png import new_figure, save_png

_PANEL_INCHES = 4


def draw_pattern_png(picture: PatternPicture, path: Path) -> None:
    """Write the PNG."""
    from matplotlib.patches import Patch

    columns = min(math.ceil(math.sqrt(picture.num_heads)), 4)
    lines = math.ceil(picture.num_heads / columns)
    legend_lines = math.ceil(len(picture.legend) / min(columns + 1, 4))
    figure = new_figure(
        max(5.5, columns * _PANEL_INCHES), lines * (_PANEL_INCHES + 0.35) + 0.6 + 0.3 * legend_lines
    )
    figure.suptitle(picture.title)
    for head in range(picture.num_heads):
        axes = figure.add_subplot(lines, columns, head + 1)
        axes.imshow(_pixels(picture, head), interpolation="nearest")
        axes.set_title(f"head {head}", fontsize=10)
        axes.tick_params(labelsize=8)
        if head % columns == 0:
            axes.set_ylabel("query", fontsize=9)
        if head // columns == lines - 1:
            axes.set_xlabel("key", fontsize=9)
    figure.legend(
        handles=[Patch(color=colour, label=label) for colour, label in picture.legend],
        loc="outside lower center",
        ncols=min(columns + 1, 4),
        frameon=False,
        fontsize=9,
    )
    save_png(figure, path)


def _pixels(picture: PatternPicture, head: int) -> NDArray[np.uint8]:
    """`(S, S, 3)`: a pixel for each query and key."""
    S = picture.seq_len
    number = np.zeros((S, S), np.uint8)  # 0: unseen, i: by branch i, then: by several
    several = len(COLOURS) + 1
    for query in range(S):
        for branch, keys in enumerate(picture.keys(head, query), 1):
            row = number[query, keys.start : keys.stop : keys.step]
            row[...] = np.where(row == 0, branch, several)
    return np.array([_rgb(colour) for colour in (NONE, *COLOURS, SEVERAL)], np.uint8)[number]


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour.removeprefix("#")))
