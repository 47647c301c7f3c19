"""Attention of a prompt as one HTML page that loads nothing: its text, coloured by attention."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dilated_models.drawing.cells import Cell
from dilated_models.drawing.page import write_page
from dilated_models.drawing.prompt_attention import PromptAttention

_SCALE = 10_000  # shares are written as integers: hundredths of a percent
# Of cells that no query sees, a longer run is left out but for its ends.
_LONGEST_UNSEEN, _END = 400, 80


def write_attention_page(
    attention: PromptAttention, cells: Sequence[Cell], layers: Sequence[int], path: Path
) -> None:
    """Write the page.

    Args:
        attention: Of the model.
        cells: Of the prompt.
        layers: Indices of the layers to offer.
        path: Of the file.
    """
    cell_of = np.repeat(np.arange(len(cells)), [cell.stop - cell.start for cell in cells])
    # Queries that are parts of one character are shown as its last one.
    queries = {int(cell_of[row]): i for i, row in enumerate(attention.rows)}
    H = attention.positions.shape[0]
    seen: list[list[list[int]]] = []
    weights: list[list[list[list[int]]]] = [[[] for _ in range(H)] for _ in layers]
    for head in range(H):
        seen.append([])
        for i in queries.values():
            positions = attention.positions[head, i]
            count = int((positions >= 0).sum())
            # Positions ascend, so tokens of one cell are neighbours, whose shares are added up.
            numbers, first = np.unique(cell_of[positions[:count]], return_index=True)
            seen[head].append(numbers.tolist())
            for line, layer in enumerate(layers):
                shares = attention.probabilities[layer, head, i, :count]
                sums = np.add.reduceat(shares, first) if count else shares
                weights[line][head].append(np.rint(sums * _SCALE).astype(int).tolist())
    shown = set(queries).union(*(row for head in seen for row in head))
    data: dict[str, Any] = {
        "scale": _SCALE,
        "first": min(shown),
        "length": len(cells),
        "layers": list(layers),
        "queries": list(queries),
        "cells": seen,
        "weights": weights,
    }
    write_page(
        path,
        "attention_page.html",
        title=f"What the last {len(attention.rows)} of {cells[-1].stop:,} tokens attended to",
        prompt=_prompt(cells, shown, queries),
        data=json.dumps(data, separators=(",", ":")),
    )


def _prompt(cells: Sequence[Cell], shown: set[int], queries: dict[int, int]) -> str:
    """The text: a span for each shown cell, and plain text between."""
    parts: list[str] = []
    last = -1
    for number in sorted(shown):
        parts.append(_plain(cells[last + 1 : number]))
        cell = cells[number]
        text = html.escape(cell.text)
        kind = ' class="query"' if number in queries else ""
        parts.append(
            f'<span{kind} data-cell="{number}" data-at="{cell.start:,}" data-text="{text}">'
            f"{text}</span>" + ("\n" if cell.ends_line else "")
        )
        last = number
    parts.append(_plain(cells[last + 1 :]))
    return "".join(parts)


def _plain(cells: Sequence[Cell]) -> str:
    if len(cells) <= _LONGEST_UNSEEN:
        return "".join(html.escape(c.text) + ("\n" if c.ends_line else "") for c in cells)
    left_out = cells[-_END].start - cells[_END].start
    note = f'\n<span class="left-out">… {left_out:,} tokens that no shown query sees …</span>\n'
    return _plain(cells[:_END]) + note + _plain(cells[-_END:])
