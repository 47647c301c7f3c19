"""The tables of slide encoders: a whole slide on a CPU, and the published code beside ours."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dilated_models.slide.config import config_of

Rows = list[dict[str, Any]]

SLIDES = """\
## Slide encoders

GigaPath's architectures with random weights in float32, the class token and a slide of random
tiles; each run in a process of its own, whose peak memory includes PyTorch, the model and the
tiles. *Embed* is one forward pass; *train* is a step that goes through the hidden state of the
eleventh block, with activation checkpointing. Two threads: where the CPU time is far below twice
the time, other jobs ran beside. 45,681 tokens are those of a slide in an issue of the published
code, which needs 39.7 GB to fine-tune on it.

| architecture | tokens | | time | CPU time | peak memory |
| --- | --- | --- | --- | --- | --- |"""

MILLION = 1_000_002  # 1,000,001 tiles and the class token
PLANNED = """\
Planned from these rows, not run: the embedding of 1,000,001 tiles on the same two cores. Memory
grows with tokens, and time with floating-point operations.

| architecture | TFLOPs | time | memory |
| --- | --- | --- | --- |"""

PUBLISHED = """\
### Beside the published code

`gigapath_slide_enc12l768d`, the same random weights, in turn. On a CPU the published code stops:
its attention needs CUDA and flash-attn. Here it was given PyTorch's flash attention of the CPU
instead, which ours runs on, too. Embeddings differ by {difference:.0e} at most. Medians of CPU
time, and peak memory. The table of positions, a million rows in the published code, has 65,536
here.

| tokens | | ours | published | published / ours | memory: ours | published |
| --- | --- | --- | --- | --- | --- | --- |"""


def slide_sections(results: Path) -> list[tuple[str, list[str]]]:
    """Name and lines of each section whose result was recorded."""
    sections = {"slides": slides, "slides_official": beside_the_published}
    return [
        (name, section(json.loads(path.read_text())["rows"]))
        for name, section in sections.items()
        if (path := results / f"{name}.json").exists()
    ]


def slides(rows: Rows) -> list[str]:
    """Time and memory of each architecture, length and kind of run."""
    return [
        SLIDES,
        *(
            f"| `{row['architecture']}` | {row['tokens']:,} | {row['kind']} "
            f"| {row['seconds']:.0f} s | {row['cpu_seconds']:.0f} s "
            f"| {row['peak_memory_bytes'] / 1e9:.2f} GB |"
            for row in rows
        ),
        "",
        PLANNED,
        *planned(rows),
    ]


def planned(rows: Rows) -> Iterator[str]:
    """What a million tiles need: memory grows with tokens, time with FLOPs."""
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        small, large = sorted(
            (r for r in rows if (r["architecture"], r["kind"]) == (architecture, "embed")),
            key=lambda row: row["tokens"],
        )
        per_token = (large["peak_memory_bytes"] - small["peak_memory_bytes"]) / (
            large["tokens"] - small["tokens"]
        )
        memory = large["peak_memory_bytes"] + per_token * (MILLION - large["tokens"])
        flops = flops_of(architecture, MILLION)
        hours = large["cpu_seconds"] / 2 * flops / flops_of(architecture, large["tokens"]) / 3600
        cells = f"{flops / 1e12:,.0f} | ≈ {hours:.1f} h | ≈ {memory / 1e9:.0f} GB"
        yield f"| `{architecture}` | {cells} |"


def flops_of(architecture: str, tokens: int) -> int:
    """Of the matrix products and the attention of one forward pass."""
    config = config_of(architecture)
    E, H = config.embed_dim, config.num_heads
    per_token = 2 * (4 * E * E + 2 * E * config.encoder.dim_feedforward)
    attention = config.pattern.flops(tokens, H, E // H)
    return config.depth * (tokens * per_token + attention) + 2 * tokens * config.in_chans * E


def beside_the_published(rows: Rows) -> list[str]:
    """Ratios of time and memory, by kind and length."""
    lines = [PUBLISHED.format(**rows[0])]
    for kind, tokens in dict.fromkeys((row["kind"], row["tokens"]) for row in rows):
        time, memory = (
            {
                who: statistics.median(
                    row[name]
                    for row in rows
                    if (row["kind"], row["tokens"], row["who"]) == (kind, tokens, who)
                )
                for who in ("ours", "published")
            }
            for name in ("cpu_seconds", "peak_memory_bytes")
        )
        lines.append(
            f"| {tokens:,} | {kind} | {time['ours']:.0f} s | {time['published']:.0f} s "
            f"| {time['published'] / time['ours']:.2f} | {memory['ours'] / 1e9:.1f} GB "
            f"| {memory['published'] / 1e9:.1f} GB |"
        )
    return lines
