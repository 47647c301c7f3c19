"""Write docs/benchmarks.md from the committed results: `python -m tools.benchmark_table`."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tools.context_gain_table import context_gain
from tools.loss_table import loss_sections
from tools.ring_table import ring_section
from tools.slides_table import slide_sections
from tools.soak_table import soak_sections
from tools.sparse_table import sparse_sections

ROOT = Path(__file__).parent.parent
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "benchmarks.md"

INTRODUCTION = """\
# Benchmarks

Generated from `benchmarks/results/` by `python -m tools.benchmark_table`; how the numbers are made
is in `benchmarks/README.md`.

"""

LENGTH = """\
## Against length

![Time of one forward pass against length, beside dense attention](images/length.svg)

Dilated attention beside PyTorch's `scaled_dot_product_attention` at the same length: one causal
sequence, {num_heads} heads of {head_dim}, {dtype}, segments of {segments} with rates {rates}.
Dilated attention does less work, because each query sees fewer keys: that is what it is for. Time
is the best of several runs. Memory is the peak above the inputs; PyTorch's kernel does not store
the S × S matrix either, so both grow with S. Dense attention was measured as far as a run takes a
minute. Behind that, numbers with ≈ are extrapolated from the last measured length: time with S²,
memory with S.

"""

EQUAL_FLOPS = """\
## Against PyTorch's attention at equal FLOPs

Five branches (w₀·2ⁱ, 2ⁱ), 8 heads of 64, one sequence. Ratios are rates, in FLOPs per second, of
dilated attention over PyTorch's `scaled_dot_product_attention` in the same run. *Windows* is a
batch of contiguous sequences of w₀ positions with the same FLOPs: the same problem sizes, so a
ratio below 1 is what strides, merging and calls cost. *Square* is a single sequence with the same
FLOPs: PyTorch at its best. *Peak* is the forward pass's memory above its inputs, in sizes of the
output.

"""

STREAMING = """\
## Sequences larger than memory

`dilated_attention_streamed` with one head of 16, float32, segments of 64, 128 and 256 positions and
dilations 1, 2 and 4, in a process of its own for each length. *Computed*: rows are made as they are
asked for, and the results go into a checksum. *Files*: from memory-mapped files to such a file,
with a journal. Tokens per second include making or reading the rows and adding up or writing the
results, whose share is given; *by tenth* are the lowest and the highest rate among the tenths of
one run; *memory* is the peak above what the process held before, *all* with that. A length that is
listed twice was run twice, the second time after the longer ones: it says how far the machine
itself drifts.

"""

BREAKDOWN = """\
Where the time of a forward pass goes, in shares of the whole call: PyTorch's kernel on contiguous
windows of the strips' shapes; what the strides of the strips add to it; the merge of the branches;
and the rest: calls, checks, allocation. Parts are timed one by one, so a share can come out
slightly below zero.

"""

SHORT = """\
## Where it is dense

One branch with r = 1 and w = S is ordinary attention. Its rate over PyTorch's own on the same
tensors, and the difference of a call in microseconds; inference is without gradients, forward with
inputs that require them.

"""

GENERATION = """\
## Generated tokens

A `LongNetLM` of 4 blocks, 4 heads of 32, segments of 512, 4,096 and 32,768 with rates 1, 8 and 64,
`key_conv` 4, float32 on one thread. One step against a `GenerationCache` after a context of each
length, in turn; and a full forward at the shortest, which is the cost of a token without a cache.
Times are those of the CPU, with quartiles.

"""

TRAINING = """\
## The default training run

`dilated train` without options, from the start of the command to its end.

"""


def _contexts(run: dict[str, Any]) -> list[str]:
    """Bits per byte with growing context."""
    return [
        f"| … of the same targets after {part['context']} tokens of context "
        f"| {part['bits_per_byte']:.3f} bits per byte |"
        for part in run["gain"]["contextwise"]["by_context"]
    ]


def page(results: Path) -> str:
    """The whole page."""
    tables = _length(results / "length.json")
    tables.append(EQUAL_FLOPS.removesuffix("\n"))
    for path in sorted(results.glob("equal_flops_*.json"), reverse=True):
        result = json.loads(path.read_text())
        tables += [
            "| S | w₀ | dtype | | forward / windows | forward+backward / windows "
            "| forward / square | forward+backward / square | peak |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
            *(_row(row) for row in result["rows"]),
            "",
            *(
                f"S = {row['seq_len'] // 1024}k, w₀ = {row['w0']}, "
                f"{'causal' if row['is_causal'] else 'full'}: {row['note']}.\n"
                for row in result["rows"]
                if "note" in row
            ),
            where(result["environment"]),
            "",
        ]
    tables += _breakdown(results / "breakdown.json")
    tables += _short(results / "short_sequences.json")
    tables += _streaming(results / "streaming.json")
    tables += _generation(results / "generation.json")
    ring = json.loads((results / "ring.json").read_text())
    loads = [row["load"] for row in ring["rows"]]
    tables += [
        *ring_section(ring["rows"]),
        "",
        f"{where(ring['environment'])} Load averages, of this and other jobs: {min(loads)} to "
        f"{max(loads)}.",
        "",
    ]
    sections = [*sparse_sections(results), *slide_sections(results), *loss_sections(results)]
    sections += soak_sections(results)
    for name, section in sections:
        environment = json.loads((results / f"{name}.json").read_text())["environment"]
        tables += [*section, "", where(environment), ""]
    gained = json.loads((results / "context_gain.json").read_text())
    tables += [*context_gain(gained["rows"]), "", where(gained["environment"]), ""]
    training = json.loads((results / "training_run.json").read_text())
    (run,) = training["rows"]
    report = [
        "| | |",
        "| --- | --- |",
        f"| wall time | {run['seconds']:.0f} s |",
        f"| steps | {run['steps']} |",
        f"| tokens per second | {run['tokens_per_second']} |",
        f"| peak memory of the process | {run['peak_memory_bytes'] / 2**20:.0f} MiB |",
        f"| validation before the first step | {run['validation'][0][1]:.3f} bits per byte |",
        f"| validation at the end | {run['final_bits_per_byte']:.3f} bits per byte |",
        f"| `xz -9` on the same {run['final_bytes']} bytes "
        f"| {run['xz_bits_per_byte']:.3f} bits per byte |",
        *_contexts(run),
        "",
        where(training["environment"]),
        "",
    ]
    return INTRODUCTION + "\n".join(tables) + "\n" + TRAINING + "\n".join(report)


def _length(path: Path) -> list[str]:
    """The section about growing lengths: a table for forward, one for forward and backward."""
    result = json.loads(path.read_text())
    rows = result["rows"]
    lines = [
        LENGTH.format(
            **rows[0],
            segments=", ".join(f"{w:,}" for w in rows[0]["segment_lengths"]),
            rates=", ".join(map(str, rows[0]["dilation_rates"])),
        ).removesuffix("\n")
    ]
    for part in dict.fromkeys(row["part"] for row in rows):
        lines += [
            f"| positions | {part.replace('_', ' and ')}: dilated | dense | dense / dilated "
            f"| memory: dilated | dense |",
            "| --- | --- | --- | --- | --- | --- |",
            *(_length_row(row) for row in rows if row["part"] == part),
            "",
        ]
    loads = [row["load"] for row in rows]
    return [
        *lines,
        f"{where(result['environment'])} Load averages, of this and other jobs: {min(loads)} to "
        f"{max(loads)}.",
        "",
    ]


def _length_row(row: dict[str, Any]) -> str:
    dilated, dense = row["dilated"], row["dense"]
    about = "≈ " if dense["extrapolated"] else ""
    ratio = dense["best_s"] / dilated["best_s"]
    cells = [
        f"{row['seq_len']:,}",
        duration(dilated["best_s"]),
        f"{about}{duration(dense['best_s'])}",
        f"{about}{float(f'{ratio:.2g}'):,g}",
        f"{dilated['peak_bytes'] / 2**20:,.0f} MiB",
        f"{about}{dense['peak_bytes'] / 2**20:,.0f} MiB",
    ]
    return f"| {' | '.join(cells)} |"


def duration(seconds: float) -> str:
    """Two digits in the largest unit that is not above the time."""
    for unit, length in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= length:
            return f"{float(f'{seconds / length:.2g}'):g} {unit}"
    return f"{float(f'{seconds * 1e3:.2g}'):g} ms"


def positions(seq_len: int) -> str:
    """A power of two as 512, 64k or 1M."""
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if seq_len % size == 0:
            return f"{seq_len // size}{unit}"
    return str(seq_len)


def _breakdown(path: Path) -> list[str]:
    """What the forward pass consists of."""
    result = json.loads(path.read_text())
    return [
        BREAKDOWN + "| S | w₀ | dtype | | windows | strides | merge | rest |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['seq_len'] // 1024}k | {row['w0']} | {row['dtype']} "
            f"| {'causal' if row['is_causal'] else 'full'} | "
            + " | ".join(f"{share:.1%}" for share in row["share_of_call"].values())
            + " |"
            for row in result["rows"]
        ),
        "",
        where(result["environment"]),
        "",
    ]


def _short(path: Path) -> list[str]:
    """The section about dense calls."""
    result = json.loads(path.read_text())
    return [
        SHORT + "| S | | inference | forward | forward+backward |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {row['seq_len']} | {'causal' if row['is_causal'] else 'full'} | "
            + " | ".join(
                f"{row[part]['ratio']:.2f} ({row[part]['extra_us']:+.0f} µs)"
                for part in ("inference", "forward", "forward_backward")
            )
            + " |"
            for row in result["rows"]
        ),
        "",
        where(result["environment"]),
        "",
    ]


def _streaming(path: Path) -> list[str]:
    """The section about streaming, once there is a result."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    return [
        STREAMING
        + "| positions | rows | tokens per second | by tenth | source and sink | memory | all |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['seq_len']:,} | {'computed' if row['rows'] == 'generated' else 'files'} "
            f"| {row['tokens_per_second']:,} "
            f"| {min(tenths := row['tokens_per_second_by_tenth']):,} to {max(tenths):,} "
            f"| {(row['source_seconds'] + row['sink_seconds']) / row['seconds']:.0%} "
            f"| {max(0, row['memory_above_start_bytes']) / 2**20:.0f} MiB "
            f"| {row['peak_memory_bytes'] / 2**20:.0f} MiB |"
            for row in result["rows"]
        ),
        "",
        where(result["environment"]),
        "",
    ]


def _generation(path: Path) -> list[str]:
    """The section about tokens of a growing text."""
    result = json.loads(path.read_text())
    lines = [
        GENERATION + "| context | | CPU time per token | quartiles | prompt | cache |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        token = row["token"]
        low, high = (f"{1e3 * token[name]:.1f}" for name in ("low_cpu_s", "high_cpu_s"))
        has_cache = "cache_bytes" in row
        cells = [
            f"{row['context']:,}",
            row["method"],
            duration(token["median_cpu_s"]),
            f"{low} to {high} ms",
            duration(row["prompt_cpu_s"]) if has_cache else "",
            f"{row['cache_bytes'] / 2**20:.1f} MiB" if has_cache else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", where(result["environment"]), ""]


def where(environment: dict[str, Any]) -> str:
    """Machine, versions, commit and date of a result."""
    facts = ", ".join(f"{name} {environment[name]}" for name in ("python", "torch", "commit"))
    return (
        f"Measured on {environment['machine']}, {environment['cores']} cores, "
        f"{environment['system']}, {facts}, {environment['date']}."
    )


def _row(row: dict[str, Any]) -> str:
    forward, both = row["forward"], row["forward_backward"]
    cells = [
        f"{row['seq_len'] // 1024}k",
        row["w0"],
        row["dtype"],
        "causal" if row["is_causal"] else "full",
        f"{forward['ratio_to_windows']:.2f}",
        f"{both['ratio_to_windows']:.2f}",
        f"{forward['ratio_to_square']:.2f}",
        f"{both['ratio_to_square']:.2f}",
        f"{row['forward_peak']['ratio']:.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with `--check` compare it with the one on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    text = page(options.results)
    if not options.check:
        options.page.write_text(text)
    elif not options.page.exists() or options.page.read_text() != text:
        print(f"{options.page} is out of date; write it with: python -m tools.benchmark_table")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
