"""The tables of dilated-sparse: block sparsity, adaptive attention, borders, Hilbert orders."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

BLOCK_SPARSE = """\
## Block-sparse attention

Against PyTorch's dense attention on one thread, head_dim {head_dim}, blocks of {block_size},
{dtype}. Speed-ups are ratios of CPU time; in brackets the *efficiency*, speed-up times kept
fraction, which is 1 where kept blocks cost what they cost in dense attention. *Mass* is the share
of the dense softmax in the kept blocks, on inputs whose blocks share one of 64 topics, so that
content decides where mass lies; patterns do not read the content, adaptive attention does.

"""

ADAPTIVE = """\
## Choosing blocks by content

`AdaptiveSparseAttention` with {sparsity_ratio:.0%} of the blocks, causal, on the same inputs and in
the same way: speed-ups over dense attention, and the share of the time that choosing takes.

"""

BORDERS = """\
## Copying across borders of segments

Models of two layers of 64 learn to copy random tokens from one distance back, {steps} steps of
{tokens_per_step:,} tokens. Then the share of right tokens, by distance and by the token's place in
its segment of {segment} tokens, behind the first border. Median of {seeds}.
Chance is 1 / {num_tokens}.
*LongNet* has segments of {segments} with rates {rates}; in *shifted layers* every second layer has
its segments half a segment earlier; *two borders* adds a branch of rate 1 with segments of
{second}; the windows are `local_window`, beside LongNet's branches in one softmax.

"""

HILBERT = """\
## Hilbert orders

As an order of tokens: the share of pairs of neighbours on a grid whose two tokens are in one
segment, along the Hilbert curve and row by row. The slide is three patches of tissue.

"""

RECALL = """\
## What adaptive attention keeps

Share of the softmax mass that a selection of {sparsity_ratio:.0%} of the blocks keeps, over what
the best blocks would keep: causal attention of {seq_len:,} positions in the layers of a model of
`dilated train`, blocks of {block_size}, sub-blocks of {sub_block_size}, {steps} steps for the gate.
*Queries of the block* is `lookahead=True`; *queries before* is the default, which reads no later
query.

"""

RETRIEVAL = """\
## Finding a value far away

One attention layer finds the value of a key among {seq_len} positions, farther away than a window
of {kept_blocks_of_last_row} of the {num_blocks} blocks reaches. It learns with dense attention,
then the gate alone, then with {sparsity_ratio:.0%} of the blocks. Share of right answers; chance is
{chance:.1%}.

"""

TILES = """\
As an order of tiles it changes no value. CPU time of dense attention in tiles along the curve,
over that of tiles row by row, with quartiles; {num_heads} heads of {head_dim}, {dtype}, one thread:

"""


def sparse_sections(results: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and lines of each section whose result was recorded."""
    sections: dict[str, Callable[[Rows], list[str]]] = {
        "block_sparse": block_sparse,
        "adaptive_speed": adaptive_speed,
        "adaptive_recall": adaptive_recall,
        "adaptive_retrieval": adaptive_retrieval,
        "border_copies": border_copies,
        "hilbert": hilbert,
    }
    for name, section in sections.items():
        path = results / f"{name}.json"
        if path.exists():
            yield name, section(json.loads(path.read_text())["rows"])


def block_sparse(rows: Rows) -> list[str]:
    """Speed by length, kind and ratio; lengths of crossover; memory; the adaptive attention."""
    speed = [row for row in rows if row["part"] == "speed"]
    lines = [
        BLOCK_SPARSE.format(**speed[0])
        + "| positions | | pattern | kept | forward | backward | mass |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in speed:
        if row["seq_len"] < 4096:
            continue
        cells = [
            f"{row['seq_len']:,}",
            "causal" if row["is_causal"] else "full",
            f"`{row['pattern_type']}`",
            f"{row['kept']:.1%}",
            *(
                f"{row[part]['speed_up']:.1f} ({row[part]['efficiency']:.2f})"
                for part in ("forward", "backward")
            ),
            "" if row["mass"] is None else f"{row['mass']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_crossovers(speed)]
    memory = [row for row in rows if row["part"] == "memory"]
    lines += [
        "",
        "| positions | heads | forward of | memory above inputs |",
        "| --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['seq_len']:,} | {row['num_heads']} "
        f"| {'dense attention' if row['attention'] == 'dense' else '`dilated_sparse`, 10 %'} "
        f"| {row['bytes_above_inputs'] / 2**20:.0f} MiB |"
        for row in memory
    ]
    return lines


def adaptive_speed(rows: Rows) -> list[str]:
    """Speed of attention that chooses its blocks, and what choosing takes of it."""
    lines = [
        ADAPTIVE.format(**rows[0])
        + "| positions | kept | mass | forward | backward | choosing, of forward "
        "| choosing, of forward and backward |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        dense, sparse = (
            [row[part][f"{name}_cpu_s"] for part in ("forward", "backward")]
            for name in ("dense", "sparse")
        )
        choosing = row["selector_share_of_forward"] * sparse[0]
        cells = [
            f"{row['seq_len']:,}",
            f"{row['kept']:.1%}",
            f"{row['mass']:.1%}",
            f"{dense[0] / sparse[0]:.1f}",
            f"{dense[1] / sparse[1]:.1f}",
            f"{choosing / sparse[0]:.1%}",
            f"{choosing / sum(sparse):.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _crossovers(rows: Rows) -> Iterator[str]:
    """From which length on each pattern is faster, of those measured."""
    yield "From this length on, of those measured, forward and backward are faster than dense:"
    yield ""
    yield "| pattern | at 10 % | at 2 % |"
    yield "| --- | --- | --- |"
    full = [row for row in rows if not row["is_causal"]]
    for kind in dict.fromkeys(row["pattern_type"] for row in full):
        cells: list[str] = []
        for ratio in (0.1, 0.02):
            own = [r for r in full if (r["pattern_type"], r["sparsity_ratio"]) == (kind, ratio)]
            slower = [row["seq_len"] for row in own if not _is_faster(row)]
            faster = [row["seq_len"] for row in own if row["seq_len"] > max(slower, default=0)]
            cells.append(f"{min(faster):,}" if faster else "none")
        yield f"| `{kind}` | {' | '.join(cells)} |"


def _is_faster(row: dict[str, Any]) -> bool:
    dense, sparse = (
        sum(row[part][f"{name}_cpu_s"] for part in ("forward", "backward"))
        for name in ("dense", "sparse")
    )
    return sparse < dense


def adaptive_recall(rows: Rows) -> list[str]:
    """Mass kept by each way to choose blocks, by layer, in percent of the best."""
    layers = " | ".join(f"layer {row['layer']}" for row in rows)
    lines = [
        RECALL.format(**rows[0]) + f"| blocks | {layers} | mean |",
        "| --- " * (2 + len(rows)) + "|",
    ]
    for name in rows[0]["of_oracle"]:
        shares = [row["of_oracle"][name] for row in rows]
        cells = [f"{share:.1%}" for share in (*shares, sum(shares) / len(shares))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def adaptive_retrieval(rows: Rows) -> list[str]:
    """Accuracy of adaptive attention and of windows, by seed."""
    lines = [
        RETRIEVAL.format(**rows[0])
        + "| blocks | seed | steps | dense | first with few blocks | trained gate | at the end |",
        "| --- " * 7 + "|",
    ]
    for row in rows:
        before = row["accuracies_before"]
        cells = [
            f"`{row['kind']}`",
            str(row["seed"]),
            " + ".join(str(n) for n in row["steps"].values() if n),
            *(
                f"{before[name]:.1%}" if name in before else ""
                for name in ("dense", "sparse at first", "trained gate")
            ),
            f"{row['accuracy']:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def border_copies(rows: Rows) -> list[str]:
    """Accuracy of each contender by distance and place."""
    plain = next(row["model"] for row in rows if row["contender"] == "LongNet")
    two = next(row["model"] for row in rows if row["contender"] == "two borders")
    contenders = list(dict.fromkeys(row["contender"] for row in rows))
    seeds = len({row["seed"] for row in rows})
    text = BORDERS.format(
        steps=rows[0]["steps"],
        tokens_per_step=rows[0]["tokens"] // rows[0]["steps"],
        segment=plain["segment_lengths"][0],
        seeds=f"{seeds} seeds" if seeds > 1 else "one seed",
        num_tokens=plain["num_tokens"],
        segments=" and ".join(map(str, plain["segment_lengths"])),
        rates=" and ".join(map(str, plain["dilation_rates"])),
        second=two["segment_lengths"][1],
    )
    lines = [
        text + f"| distance | place in segment | {' | '.join(contenders)} |",
        "| --- " * (2 + len(contenders)) + "|",
    ]
    for i, part in enumerate(rows[0]["accuracy"]):
        cells = [
            _median([row["accuracy"][i]["accuracy"] for row in rows if row["contender"] == name])
            for name in contenders
        ]
        near, far = part["distances"]
        first, last = part["places"]
        shown = " | ".join(f"{cell:.0%}" for cell in cells)
        lines.append(f"| {near} to {far} | {first} to {last} | {shown} |")
    return lines


def _median(values: list[float]) -> float:
    values = sorted(values)
    middle = len(values) // 2
    return values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2


def hilbert(rows: Rows) -> list[str]:
    """Neighbours within a segment, and the time of tile orders."""
    counted = [row for row in rows if row["part"] == "locality"]
    timed = [row for row in rows if row["part"] == "tile_orders"]
    return [
        HILBERT + "| grid | tokens | segment | Hilbert | row by row |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['grid']} | {row['tokens']:,} | {row['segment']:,} | {row['hilbert']:.1%} "
            f"| {row['row_by_row']:.1%} |"
            for row in counted
        ),
        "",
        TILES.format(**timed[0]) + "| positions | tile | | time |",
        "| --- | --- | --- | --- |",
        *(
            f"| {row['seq_len']:,} | {row['tile']} | {'causal' if row['is_causal'] else 'full'} "
            f"| {row['ratio']['median']:.2f} ({row['ratio']['low']:.2f} to "
            f"{row['ratio']['high']:.2f}) |"
            for row in timed
        ),
    ]
