"""Sections of docs/longnet-paper.md about trained models: table 2, figure 7b, mixing weights."""

import statistics
from collections.abc import Sequence
from typing import Any

from tools.line_plot import Point, Tick, line_plot, round_ticks

Rows = list[dict[str, Any]]

# Table 2 of arXiv 2307.02486: perplexity on The Stack in windows of 2K, 8K and 32K tokens.
PAPER_TABLE = {
    ("dense", 2048): (4.24, 5.07, 11.29),
    ("fixed-sparse", 8192): (4.39, 3.35, 8.79),
    ("LongNet", 8192): (4.23, 3.24, 3.36),
    ("fixed-sparse", 16384): (4.85, 3.73, 19.77),
    ("LongNet", 16384): (4.27, 3.26, 3.31),
    ("fixed-sparse", 32768): (5.15, 4.00, 3.64),
    ("LongNet", 32768): (4.37, 3.33, 3.01),
}

QUALITY = """\
## Loss by the length of training windows (table 2)

Models of {layers} layers of {d_model} with {nhead} heads and {parameters:,} parameters train on
{tokens:,} bytes of the Python standard library, {steps} steps; the first steps are mostly on edited
copies, as in `dilated train`. The paper has models of 12 layers of 768 and 157 billion tokens. All
read the same {targets:,} unseen bytes in windows of three lengths: bits per byte. *Keys* is the
mean number of keys of a query in training. Fixed-sparse attention sees its block of {short} and the
last columns of each block before, {columns}, so that it has
as many keys as LongNet. Longer inputs than in training are read with blockwise causal attention.

"""

CONTEXT = """\
## Loss against context (figure 7b)

In the paper the loss falls as the context grows from 2K to 32K tokens. Here the models of
`dilated train` ({tokens:,} bytes of training, windows of {seq_len:,}) score the same {targets:,}
unseen bytes after more and more context: {copies} seeds with the warm-up on edited copies, and
{plain} without. From 64 bytes of context to {seq_len:,}, the median falls by {gain:.3f} bits with
it and by {plain_gain:.3f} without. The table is under
[Benchmarks](benchmarks.md#what-context-gives).

![Bits per byte against context, models of dilated train](images/longnet-paper-context.svg)
"""

SMALL_CONTEXT = """\
The models of the table above, on {targets:,} bytes:

![Bits per byte against context, by training window](images/longnet-paper-windows.svg)
"""

MIXING = """\
## Exact and detached mixing weights

The official implementation computes the weights of the branches without a gradient. Forward is the
same. *LongNet* and *detached* train from the same weights on the same batches, in windows of
{seq_len:,}. The difference of their loss on unseen bytes, detached minus exact:

"""

GRADIENT = """\
How far the detached gradient is from the exact one at the same weights, ‖difference‖ / ‖exact‖ on
an unseen batch, before and after training with the exact one:

"""


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Median, and least and largest if there are several."""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}} ({low:{form}} to {high:{form}})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown with an empty line behind it."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def by_contender(rows: Rows) -> dict[str, Rows]:
    """Rows of each contender, one for each seed, in the order of the first seed."""
    names = dict.fromkeys(row["contender"] for row in rows)
    return {name: [row for row in rows if row["contender"] == name] for name in names}


def losses(rows: Rows, part: str, key: str) -> dict[int, list[float]]:
    """Bits per byte of all seeds by window or context."""
    return {
        entry[key]: [row[part][i]["bits_per_byte"] for row in rows]
        for i, entry in enumerate(rows[0][part])
    }


def quality(rows: Rows) -> list[str]:
    """Table 2: ours beside the paper's."""
    groups = {n: g for n, g in by_contender(rows).items() if g[0]["kind"] != "detached"}
    first = rows[0]
    columns = ", ".join(
        f"{g[0]['columns']} with windows of {g[0]['seq_len']:,}"
        for g in groups.values()
        if g[0]["kind"] == "fixed-sparse"
    )
    windows = list(losses(rows[:1], "by_window", "window"))
    facts = {name: first[name] for name in ("parameters", "tokens", "steps", "targets")}
    facts |= {"d_model": first["model"]["d_model"], "nhead": first["model"]["nhead"]}
    lines = [
        QUALITY.format(
            **facts,
            layers=first["model"]["num_decoder_layers"],
            short=windows[0],
            columns=columns,
        )
    ]
    cells: list[list[str]] = []
    for name, group in groups.items():
        paper = PAPER_TABLE[group[0]["kind"], group[0]["seq_len"] * 16 // group[0]["scale"]]
        found = losses(group, "by_window", "window").values()
        cells.append(
            [name, f"{group[0]['mean_keys']:.0f}"]
            + [spread(values) for values in found]
            + [" / ".join(f"{value:.2f}" for value in paper)]
        )
    head = ["attention, training window", "keys", *(f"windows of {w:,}" for w in windows)]
    lines += table([*head, "paper's perplexity at 16 times the lengths"], cells)
    longest = f"{windows[-1]}"
    pairs = [
        (f"LongNet, {longest}", f"fixed-sparse, {longest}"),
        (f"LongNet, {longest}", f"dense, {windows[0]}"),
        (f"LongNet, {longest}", f"LongNet, {windows[1]}"),
    ]
    told = [
        f"- below that of *{b}* in {_wins(groups[a], groups[b], windows[-1])}" for a, b in pairs
    ]
    head = f"In windows of {windows[-1]:,}, the loss of *LongNet, {longest}* is"
    return [
        *lines,
        f"{head} (in the paper, in windows of 32K, all three times lower):",
        "",
        *told,
        "",
    ]


def _wins(ours: Rows, theirs: Rows, window: int) -> str:
    """In how many seeds our loss is lower, and by how much."""
    pairs = zip(*(losses(r, "by_window", "window")[window] for r in (ours, theirs)), strict=True)
    gains = [b - a for a, b in pairs]
    return (
        f"{sum(gain > 0 for gain in gains)} of {len(gains)} seeds, by {spread(gains)} bits per byte"
    )


def context(rows: Rows) -> tuple[list[str], str]:
    """Figure 7b from the trainings of `context_gain.json`."""
    preset = next(row["model"] for row in rows if row["copied_steps"])
    rows = [row for row in rows if row["model"] == preset]
    groups = {
        "with copies": [row for row in rows if row["copied_steps"]],
        "without copies": [row for row in rows if not row["copied_steps"]],
    }
    text = CONTEXT.format(
        tokens=rows[0]["tokens"],
        seq_len=rows[0]["by_context"][-1]["context"],
        targets=rows[0]["num_targets"],
        gain=_gain(groups["with copies"]),
        plain_gain=_gain(groups["without copies"]),
        copies=len(groups["with copies"]),
        plain=len(groups["without copies"]),
    )
    return [text], context_plot(groups)


def _gain(rows: Rows) -> float:
    """Fall of the median loss from 64 bytes of context to the most."""
    medians = {c: statistics.median(x) for c, x in losses(rows, "by_context", "context").items()}
    return medians[64] - list(medians.values())[-1]


def small_context(rows: Rows) -> tuple[list[str], str]:
    """The same for the models of table 2."""
    groups = {n: g for n, g in by_contender(rows).items() if g[0]["kind"] != "detached"}
    found = {name: losses(group, "by_context", "context") for name, group in groups.items()}
    cells = [
        [f"{length:,}", *(spread(by_length[length]) for by_length in found.values())]
        for length in next(iter(found.values()))
    ]
    text = SMALL_CONTEXT.format(targets=rows[0]["targets_by_context"])
    return [text, *table(["context", *found], cells)], context_plot(groups)


def context_plot(groups: dict[str, Rows]) -> str:
    """Bits per byte against context, with the seeds as a band."""
    found = {name: losses(group, "by_context", "context") for name, group in groups.items()}
    values = [x for by_length in found.values() for seeds in by_length.values() for x in seeds]
    return line_plot(
        "Loss against context",
        "bits per byte of the same targets; bands are the seeds",
        {
            name: [
                Point(length, statistics.median(seeds), min(seeds), max(seeds))
                for length, seeds in by_length.items()
            ]
            for name, by_length in found.items()
        },
        x_ticks=[Tick(length, f"{length:,}") for length in next(iter(found.values()))],
        y_ticks=round_ticks(min(values), max(values)),
        x_label="bytes of context",
        logarithmic=(True, False),
    )


def mixing(rows: Rows) -> list[str]:
    """What detached mixing weights change."""
    groups = by_contender(rows)
    (detached,) = (g for g in groups.values() if g[0]["kind"] == "detached")
    exact = groups[f"LongNet, {detached[0]['seq_len']}"]
    ours, theirs = (losses(group, "by_window", "window") for group in (exact, detached))
    cells = [
        [
            f"{window:,}",
            spread(ours[window]),
            spread(theirs[window]),
            spread([b - a for a, b in zip(ours[window], theirs[window], strict=True)], "+.4f"),
        ]
        for window in ours
    ]
    lines = [
        MIXING.format(seq_len=detached[0]["seq_len"]),
        *table(["window", "exact", "detached", "difference of a seed"], cells),
    ]
    parts = list(exact[0]["gradient_error"]["before"])
    cells = [
        [
            "all parameters" if part == "all" else f"projection of the {part}",
            *(
                spread([row["gradient_error"][when][part] for row in exact], ".1%")
                for when in ("before", "after")
            ),
        ]
        for part in parts
    ]
    return [*lines, GRADIENT, *table(["gradient of", "before", "after"], cells)]
