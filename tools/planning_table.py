"""The tables of docs/planning.md: `python -m tools.planning_table`."""

import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

from dilated_core import select_segments
from dilated_models import LongNetConfig
from dilated_models.planning.hardware import DATA_SHEETS, hardware_named
from dilated_models.planning.job import Job
from dilated_models.planning.plan import Plan, plan_job
from dilated_models.planning.table import duration, gigabytes

PAGE = Path(__file__).parent.parent / "docs" / "planning.md"
RESULT = PAGE.parent.parent / "benchmarks" / "results" / "plan_check.json"
END = "<!-- end -->\n"
SEQ_LEN, VOCABULARY = 10**9, 32_000
HARDWARE = ("a100-80gb", "h100-sxm", "h200", "mi300x", "b200")
DEVICES = (512, 1024)


def billion_plans() -> list[Plan]:
    """A step of the paper's base model on one row of a billion tokens."""
    segments = select_segments(SEQ_LEN, num_heads=12)
    model = LongNetConfig(
        num_tokens=VOCABULARY,
        segment_lengths=segments.segment_lengths,
        dilation_rates=segments.dilation_rates,
        positions="rotary",
        activation_checkpointing=True,
    )
    return [
        plan_job(
            Job(
                model=model, seq_len=SEQ_LEN, dtype="bfloat16", devices=devices, cp=devices,
                fsdp=True, on_gpu=True,
            ),
            hardware_named(name),
            with_change=False,
        )
        for devices in DEVICES
        for name in HARDWARE
    ]  # fmt: skip


@lru_cache(maxsize=1)
def billion_table() -> str:
    """A row for each number of devices and each device."""
    lines = [
        "| devices | device | memory of a rank | of its own | time of a step | at full rates "
        "| sent by a rank | binding |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for plan in billion_plans():
        assert plan.least_seconds is not None
        cells = [
            f"{plan.job.devices:,}",
            plan.hardware.name,
            gigabytes(plan.memory.total),
            f"{gigabytes(plan.hardware.memory_bytes)}{'' if plan.fits else ': too little'}",
            duration(plan.seconds.total),
            duration(plan.least_seconds.total),
            gigabytes(plan.bytes_sent),
            plan.binding,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def hardware_table() -> str:
    """The figures of the data sheets, with links."""
    lines = [
        "| name | memory | float32 | bfloat16 | float16 | memory bandwidth | in a node | network "
        "| sources |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, sheet in DATA_SHEETS.items():
        tflops = [
            f"{sheet.tflops[dtype]:g}" if dtype in sheet.tflops else "no"
            for dtype in ("float32", "bfloat16", "float16")
        ]
        node = f"{sheet.per_node} × {sheet.node_gb_per_s:g} GB/s" if sheet.per_node > 1 else "alone"
        links = ", ".join(f"[{i}]({source})" for i, source in enumerate(sheet.sources, 1))
        cells = [
            f"`{name}`", f"{sheet.memory_gb:g} GB", *tflops, f"{sheet.memory_gb_per_s:g} GB/s",
            node, f"{sheet.network_gb_per_s:g} GB/s", links,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def check_table() -> str:
    """What `benchmarks/plan_check.py` recorded."""
    if not RESULT.exists():
        return "Not recorded yet.\n"
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    where = result["environment"]
    lines = [
        f"{where['machine']}, one thread, PyTorch {where['torch']}, commit {where['commit']}.",
        "",
        "| job | measured memory | planned | resident | measured time | planned |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        cells = [
            row["name"],
            gigabytes(row["measured_bytes"]),
            f"× {row['bytes_ratio']:.2f}",
            gigabytes(row["resident_bytes"]),
            duration(row["measured_seconds"]),
            f"× {row['seconds_ratio']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


TABLES = {
    "check_table": check_table,
    "billion_table": billion_table,
    "hardware_table": hardware_table,
}


def written(text: str) -> str:
    """The page with current tables."""
    for name, table in TABLES.items():
        begin = f"<!-- python -m tools.planning_table writes this: {name} -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n{table()}\n{END}{after}"
    return text


def main(arguments: list[str] | None = None) -> int:
    """Write the tables into the page, or with `--check` compare them with those there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a table is out of date")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    text = options.page.read_text(encoding="utf-8")
    current = written(text)
    if not options.check:
        options.page.write_text(current, encoding="utf-8")
    elif text != current:
        print(f"{options.page} is out of date; write it with: python -m tools.planning_table")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
