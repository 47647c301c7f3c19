"""The tables of benchmarks/results/context_gain.json, for docs/benchmarks.md."""

import statistics
from typing import Any

CONTEXT = """\
## What context gives

Bits per byte of the same {num_targets:,} targets in unseen source files, with growing context,
after {steps:,} steps of {tokens_per_step:,} tokens. The first two columns are medians over {seeds}
seeds of the model of the preset `tiny`, trained with and without the warm-up on edited copies. The
third is one seed with segments of {segments} and rates {rates}, whose borders coincide. The
counting predictor is no neural network.

"""

BORDER = """\
Behind a border of the segments of rate 1, a query sees dilated keys only. The loss by the number of
tokens just before the query that such a segment shows, in edited copies of unseen text:

"""


def context_gain(rows: list[dict[str, Any]]) -> list[str]:
    """Two tables: loss against context for three trainings, and loss behind borders of segments."""
    preset = next(row["model"] for row in rows if row["copied_steps"])
    border = [row for row in rows if row["model"] != preset]
    copies = [row for row in rows if row["copied_steps"] and row["model"] == preset]
    plain = [row for row in rows if not row["copied_steps"]]
    columns = [_median(copies), _median(plain), _median(border), _losses(copies[0]["predictor"])]
    model = border[0]["model"]
    ranges = dict.fromkeys(
        (part["nearest"], part["farthest"])
        for row in (*border, *copies)
        for part in row["by_border"]
    )
    return [
        CONTEXT.format(
            num_targets=rows[0]["num_targets"],
            steps=rows[0]["training"]["steps"],
            tokens_per_step=rows[0]["tokens"] // rows[0]["training"]["steps"],
            seeds=len(copies),
            segments=" and ".join(map(str, model["segment_lengths"])),
            rates=" and ".join(map(str, model["dilation_rates"])),
        )
        + "| tokens of context | with copies | without copies | segments with common borders "
        "| counting predictor |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {context} | {' | '.join(f'{column[context]:.3f}' for column in columns)} |"
            for context in columns[0]
        ),
        "",
        BORDER + "| tokens shown | segments with common borders | `tiny` |",
        "| --- | --- | --- |",
        *(
            f"| {near} to {far} | {_copied(border, near, far)} | {_copied(copies, near, far)} |"
            for near, far in ranges
        ),
    ]


def _losses(rows: list[dict[str, Any]]) -> dict[int, float]:
    return {row["context"]: row["bits_per_byte"] for row in rows}


def _median(runs: list[dict[str, Any]]) -> dict[int, float]:
    """Median over runs of the loss with each context."""
    losses = [_losses(run["by_context"]) for run in runs]
    return {context: statistics.median(x[context] for x in losses) for context in losses[0]}


def _copied(runs: list[dict[str, Any]], nearest: int, farthest: int) -> str:
    """Median over runs of the loss in edited copies at a range of distances; may be none."""
    losses = [
        part["copied_bits_per_byte"]
        for run in runs
        for part in run["by_border"]
        if (part["nearest"], part["farthest"]) == (nearest, farthest)
    ]
    return f"{statistics.median(losses):.2f}" if losses else ""
