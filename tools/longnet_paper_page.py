"""Write docs/longnet-paper.md and its plots from results: `python -m tools.longnet_paper_page`."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.benchmark_table import RESULTS, duration, where
from tools.line_plot import Point, Tick, line_plot
from tools.longnet_paper_quality import (
    by_contender,
    context,
    mixing,
    quality,
    small_context,
    spread,
    table,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
Rows = list[dict[str, Any]]
Section = Callable[[Rows], tuple[list[str], str]]  # text, and a plot or nothing

LEARNT = 0.5  # share of right tokens from which the page says that a model has learnt to copy

INTRODUCTION = """\
# The LongNet paper, scaled down

Generated from `benchmarks/results/` by `python -m tools.longnet_paper_page`;
`python benchmarks/reproduce_longnet.py` measures it. The experiments are those of
[arXiv 2307.02486](https://arxiv.org/abs/2307.02486) at sizes that one thread of a CPU trains in
a few minutes: lengths are 1/16 of the paper's, and everything else is smaller by far more. So
what does not show here may show there, and `--scale 2` and more come nearer to it. Numbers are
medians over seeds, with the least and the largest in brackets; each section says how many.

"""

LATENCY = """\
## Time against length (figure 5)

Forward passes over {total:,} positions, as one sequence or as a batch of shorter ones: causal,
{num_heads} heads of {head_dim}, {dtype}, one thread, CPU time, the least of {rounds} runs or fewer.
Segments of {segments} with rates {rates}. *Dense* is PyTorch's `scaled_dot_product_attention`.
The paper has a billion positions on many GPUs: dilated attention hardly takes longer for one
sequence than for many, and dense attention grows with the length.

![Time of a forward pass against length](images/longnet-paper-latency.svg)
"""

STRIDED = """\
## Do strided branches learn to copy?

Models of two layers of {d_model} learn to copy random tokens from one distance back,
{steps:,} steps of {tokens_per_step:,} tokens, distances from {near} to {farthest}. LongNet has
segments of {segments} with rates {rates}. Distances from {far} on lie outside all segments of
rate 1: only branches with rates 2 and 4 reach them. *Far copies only* trains on these distances
alone; in *shifted layers* every second layer has its segments half a segment of rate 1 earlier;
*local window* adds the last {segment} positions to the branches. The share of right tokens, by
distance and by place in the segment of rate 1; chance is 1 / {num_tokens}.

![Copy accuracy by distance](images/longnet-paper-strided.svg)
"""

BORDERS = """\
## Behind a border of segments

The paper does not say what happens to a query just behind a border of the segments of rate 1: it
sees dilated keys only. Models of two layers of {d_model} learn to copy random tokens, {steps} steps
of {tokens_per_step:,} tokens, with segments of {segments} and rates {rates} in *LongNet*. The
share of right tokens at distances of {nearest} to {farthest}, by the token's place in its segment
of rate 1; chance is 1 / {num_tokens}. Other distances are under
[Benchmarks](benchmarks.md#copying-across-borders-of-segments).

![Copy accuracy by place in the segment](images/longnet-paper-borders.svg)
"""

RESIDUES = """\
A head of rate r sees positions that are the same modulo r as the query. So it can copy the token
that follows a match only if the distance is 1 modulo r; otherwise two layers must work together.
The same for distances from {far} on, by that remainder:

"""


def latency(rows: Rows) -> tuple[list[str], str]:
    """Figure 5 and its numbers."""
    first = rows[0]
    cells: list[list[str]] = []
    for row in rows:
        about = "≈ " if row["dense"]["extrapolated"] else ""
        dilated, dense = row["dilated"]["best_cpu_s"], row["dense"]["best_cpu_s"]
        ratio = f"{about}{float(f'{dense / dilated:.2g}'):g}"
        shape = f"{row['batch_size']:,} × {row['seq_len']:,}"
        cells.append([shape, duration(dilated), f"{about}{duration(dense)}", ratio])
    times = [row[name]["best_cpu_s"] for row in rows for name in ("dilated", "dense")]
    ticks = [t for t in (0.01, 0.1, 1, 10, 100, 1000) if min(times) / 10 < t < max(times) * 10]
    plot = line_plot(
        "Time of a forward pass at a fixed number of positions",
        f"{first['batch_size'] * first['seq_len']:,} positions, CPU time, one thread",
        {
            name: [
                Point(
                    row["seq_len"],
                    row[name]["best_cpu_s"],
                    min(row[name]["cpu_s"] or [row[name]["best_cpu_s"]]),
                    max(row[name]["cpu_s"] or [row[name]["best_cpu_s"]]),
                    row[name]["extrapolated"],
                )
                for row in rows
            ]
            for name in ("dilated", "dense")
        },
        x_ticks=[Tick(row["seq_len"], f"{row['seq_len']:,}") for row in rows],
        y_ticks=[Tick(t, duration(t)) for t in ticks],
        x_label="positions of a sequence",
        logarithmic=(True, True),
    )
    text = LATENCY.format(
        **{name: first[name] for name in ("num_heads", "head_dim", "dtype")},
        total=first["batch_size"] * first["seq_len"],
        rounds=max(len(row["dilated"]["cpu_s"]) for row in rows),
        segments=", ".join(f"{w:,}" for w in first["segment_lengths"]),
        rates=", ".join(map(str, first["dilation_rates"])),
    )
    return [text, *table(["sequences", "dilated", "dense", "dense / dilated"], cells)], plot


def accuracy(row: dict[str, Any], **wanted: Any) -> float:
    """Share of right tokens over the entries with the wanted distances, places or residue."""
    entries = [
        entry
        for entry in row["accuracy"]
        if all(entry[name] == value for name, value in wanted.items())
    ]
    return sum(entry["right"] for entry in entries) / sum(entry["total"] for entry in entries)


def strided(rows: Rows) -> tuple[list[str], str]:
    """Whether branches with rates above 1 learn to copy."""
    groups = by_contender(rows)
    entries = rows[0]["accuracy"]
    distances = [list(pair) for pair in dict.fromkeys(tuple(e["distances"]) for e in entries)]
    places = [list(pair) for pair in dict.fromkeys(tuple(e["places"]) for e in entries)]
    longnet = groups["LongNet"][0]
    far = distances[-1]
    text = STRIDED.format(
        d_model=longnet["model"]["d_model"],
        steps=longnet["steps"],
        tokens_per_step=longnet["tokens"] // longnet["steps"],
        segments=", ".join(map(str, longnet["model"]["segment_lengths"])),
        rates=", ".join(map(str, longnet["model"]["dilation_rates"])),
        near=distances[0][0],
        far=far[0],
        farthest=far[1],
        segment=longnet["model"]["segment_lengths"][0],
        num_tokens=longnet["model"]["num_tokens"],
    )
    cells = [
        [
            f"{distance[0]} to {distance[1]}",
            f"{place[0]} to {place[1]}",
            *(
                spread([accuracy(row, distances=distance, places=place) for row in group], ".0%")
                for group in groups.values()
            ),
        ]
        for distance in distances
        for place in places
    ]
    lines = [text, *table(["distance", "place in segment", *groups], cells)]
    cells = [
        [
            f"{residue}",
            {0: "rates 2 and 4", 2: "rate 2"}.get(residue, "none"),
            *(
                spread([accuracy(row, distances=far, residue=residue) for row in group], ".0%")
                for group in groups.values()
            ),
        ]
        for residue in range(4)
    ]
    head = ["(distance - 1) modulo 4", "branches that see the token", *groups]
    lines += [RESIDUES.format(far=far[0]), *table(head, cells)]
    near, beyond = (
        statistics.median(accuracy(row, distances=d) for row in groups["LongNet"])
        for d in (distances[0], far)
    )
    chance = 1 / longnet["model"]["num_tokens"]
    lines.append(
        f"LongNet copies {near:.0%} of the tokens at distances of {distances[0][0]} to "
        f"{distances[0][1]} and {beyond:.0%} at {far[0]} to {far[1]}. "
        + (
            "So this training is too short even for the branch of rate 1, and says nothing about "
            "what strided branches learn in a longer one.\n"
            if near < LEARNT
            else "So the branch of rate 1 has learnt to copy"
            + (
                ", and so have the others.\n"
                if beyond >= LEARNT
                else f", and the others little: chance is {chance:.0%}.\n"
                if beyond > 2 * chance
                else ", and the others have not.\n"
            )
        )
    )
    seen, unseen = (
        statistics.median(
            statistics.mean(accuracy(row, distances=far, residue=r) for r in residues)
            for row in groups["LongNet"]
        )
        for residues in ((0, 2), (1, 3))
    )
    if near >= LEARNT:
        lines.append(
            f"At these far distances LongNet copies {seen:.0%} where a branch sees the token that "
            f"follows the match, and {unseen:.0%} where none does and two layers work together.\n"
        )
    names = [f"{distance[0]} to {distance[1]}" for distance in distances]
    shares = {
        name: [[accuracy(row, distances=d) for row in group] for d in distances]
        for name, group in groups.items()
    }
    plot = line_plot(
        "Copy accuracy by distance",
        "share of right tokens; bands are the seeds",
        {
            name: [
                Point(i, statistics.median(seeds), min(seeds), max(seeds))
                for i, seeds in enumerate(by_distance)
            ]
            for name, by_distance in shares.items()
        },
        x_ticks=[Tick(i, name) for i, name in enumerate(names)],
        y_ticks=[Tick(i / 5, f"{i / 5:.0%}") for i in range(6)],
        x_label="distance of the copy",
    )
    return lines, plot


def borders(rows: Rows) -> tuple[list[str], str]:
    """Copy accuracy at the middle distances of `border_copies.json`, by place in the segment."""
    groups = by_contender(rows)
    longnet = groups["LongNet"][0]
    entries = longnet["accuracy"]
    distances = sorted({tuple(entry["distances"]) for entry in entries})
    nearest, farthest = distances[len(distances) // 2]
    wanted = [entry for entry in entries if entry["distances"] == [nearest, farthest]]
    places = [entry["places"] for entry in wanted]

    def seeds(group: Rows, place: list[int]) -> list[float]:
        return [
            entry["accuracy"]
            for row in group
            for entry in row["accuracy"]
            if entry["distances"] == [nearest, farthest] and entry["places"] == place
        ]

    text = BORDERS.format(
        **{name: longnet["model"][name] for name in ("d_model", "num_tokens")},
        steps=longnet["steps"],
        tokens_per_step=longnet["tokens"] // longnet["steps"],
        segments=" and ".join(map(str, longnet["model"]["segment_lengths"])),
        rates=" and ".join(map(str, longnet["model"]["dilation_rates"])),
        nearest=nearest,
        farthest=farthest,
    )
    shares = {name: [seeds(group, place) for place in places] for name, group in groups.items()}
    cells = [
        [f"{place[0]} to {place[1]}", *(spread(found[i], ".0%") for found in shares.values())]
        for i, place in enumerate(places)
    ]
    plot = line_plot(
        f"Copy accuracy at distances {nearest} to {farthest}",
        "share of right tokens by place in the segment; bands are the seeds",
        {
            name: [
                Point(i, statistics.median(seeds), min(seeds), max(seeds))
                for i, seeds in enumerate(found)
            ]
            for name, found in shares.items()
        },
        x_ticks=[Tick(i, f"{place[0]} to {place[1]}") for i, place in enumerate(places)],
        y_ticks=[Tick(i / 5, f"{i / 5:.0%}") for i in range(6)],
        x_label="place of the token in its segment",
    )
    return [text, *table(["place in segment", *groups], cells)], plot


def page(results: Path) -> tuple[str, dict[str, str]]:
    """The page, and its pictures by file name; what has no result is left out."""
    lines: list[str] = []
    pictures: dict[str, str] = {}

    def add(name: str, picture: str, section: Section) -> None:
        path = results / f"{name}.json"
        if not path.exists():
            return
        result = json.loads(path.read_text())
        rows = result["rows"]
        text, plot = section(rows)
        if plot:
            pictures[f"longnet-paper-{picture}.svg"] = plot
        seeds = len({row["seed"] for row in rows if "seed" in row})
        count = f"{seeds} seeds. " if seeds > 1 else "One seed. " if seeds else ""
        lines.extend([*text, f"{count}{where(result['environment'])}", ""])

    add("longnet_paper_quality", "", lambda rows: (quality(rows), ""))
    add("context_gain", "context", context)
    add("longnet_paper_quality", "windows", small_context)
    add("longnet_paper_latency", "latency", latency)
    add("longnet_paper_quality", "", lambda rows: (mixing(rows), ""))
    add("longnet_paper_strided", "strided", strided)
    add("border_copies", "borders", borders)
    return INTRODUCTION + "\n".join(lines), pictures


def main(arguments: list[str] | None = None) -> int:
    """Write the page and its pictures, or with `--check` compare them with those on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if something is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    options = parser.parse_args(arguments)
    text, pictures = page(options.results)
    files = {options.docs / "longnet-paper.md": text}
    files |= {options.docs / "images" / name: svg for name, svg in pictures.items()}
    for path, content in files.items():
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        elif not path.exists() or path.read_text() != content:
            print(f"{path} is out of date; write it with: python -m tools.longnet_paper_page")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
