"""Compile every kernel that ships for GPUs that are not here, and record what it uses of them.

`python -m tools.kernel_resources` compiles each line of the table of configurations, for each
head_dim, dtype and causality, and writes benchmarks/kernel_resources.json and the
table in docs/kernels.md; rows that are there for the same sources and Triton are kept, so it can be
stopped and goes on. `--check` compiles nothing: it fails unless the file covers the configurations,
without spills and within the shared memory, and the page shows it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "kernel_resources.json"
PAGE = ROOT / "docs" / "kernels.md"
KERNELS = ROOT / "packages" / "dilated-kernels" / "src" / "dilated_kernels" / "fused"
SOURCES = ("addressing.py", "arithmetic.py", "forward.py", "backward.py")

BEGIN, END = "<!-- kernel_resources -->", "<!-- /kernel_resources -->"

CAPABILITIES = ((8, 0), (9, 0), (10, 0))
HEAD_DIMS = (16, 32, 48, 64, 96, 128, 256)
ARITHMETIC = (
    ("bfloat16", "tf32"),
    ("float16", "tf32"),
    ("float32", "ieee"),
    ("float32", "tf32"),
)
KINDS = ("forward", "dq", "dk_dv")

Specialization = tuple[str, str, str, int, tuple[int, int], bool]


def specializations() -> Iterator[Specialization]:
    """Kernel, dtype, precision, head_dim, capability and causality of all that ship."""
    for capability in CAPABILITIES:
        for dtype, precision in ARITHMETIC:
            for kind in KINDS:
                for head_dim in HEAD_DIMS:
                    for is_causal in (False, True):
                        yield kind, dtype, precision, head_dim, capability, is_causal


def key(specialization: Specialization) -> str:
    """A specialization as a key of JSON."""
    kind, dtype, precision, head_dim, (major, minor), is_causal = specialization
    arithmetic = f"{dtype} {precision}" if dtype == "float32" else dtype
    causality = "causal" if is_causal else "full"
    return f"{kind} | {arithmetic} | {head_dim} | {major}.{minor} | {causality}"


def sources_hash() -> str:
    """What tells whether the kernels are those that were compiled."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((KERNELS / name).read_bytes())
    return digest.hexdigest()[:16]


def compile_one(specialization: Specialization) -> tuple[str, dict[str, Any]]:
    """Resources and configuration of one specialization."""
    import torch
    from dilated_kernels.fused.ahead_of_time import compile_kernel
    from dilated_kernels.fused.configs import tabled_config

    kind, dtype_name, precision, head_dim, capability, is_causal = specialization
    dtype = getattr(torch, dtype_name)
    config = tabled_config(kind, dtype, head_dim, capability, precision)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        resources = compile_kernel(
            kind,  # pyright: ignore[reportArgumentType]
            dtype,
            head_dim,
            capability,
            is_causal=is_causal,
            precision=precision,
        )
    return key(specialization), {"config": list(config), **resources._asdict()}


def problems(rows: dict[str, dict[str, Any]]) -> list[str]:
    """What is missing in the rows, or does not fit."""
    from dilated_kernels.fused.configs import SHARED_BYTES, generation, tabled_config

    found: list[str] = []
    for specialization in specializations():
        kind, dtype_name, precision, head_dim, capability, _ = specialization
        row = rows.get(key(specialization))
        if row is None:
            found.append(f"{key(specialization)}: not compiled")
            continue
        import torch

        config = tabled_config(
            kind,  # pyright: ignore[reportArgumentType]
            getattr(torch, dtype_name),
            head_dim,
            capability,
            precision,
        )
        if row["config"] != list(config):
            found.append(f"{key(specialization)}: compiled with {row['config']}, not {config}")
        if row["spilled_bytes"]:
            found.append(f"{key(specialization)}: spills {row['spilled_bytes']} bytes")
        if row["shared_bytes"] > SHARED_BYTES[generation(capability)]:
            found.append(f"{key(specialization)}: {row['shared_bytes']} bytes of shared memory")
    return found


def write(version: str, rows: dict[str, dict[str, Any]]) -> None:
    """Write the record, a line for each row."""
    head = json.dumps({"triton": version, "sources": sources_hash()})[1:-1]
    lines = [f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items())]
    RESULT.write_text("\n".join([f"{{{head},", '"rows": {', ",\n".join(lines), "}}"]) + "\n")


def page(rows: dict[str, dict[str, Any]]) -> str:
    """docs/kernels.md with the table of these rows between its two markers."""
    from dilated_kernels.fused.configs import generation

    cells: dict[tuple[str, str, str], dict[int, list[dict[str, Any]]]] = {}
    for specialization in specializations():
        kind, dtype, precision, head_dim, capability, _ = specialization
        arithmetic = f"float32, {precision}" if dtype == "float32" else "half precision"
        line = cells.setdefault((generation(capability), arithmetic, kind), {})
        line.setdefault(head_dim, []).append(rows[key(specialization)])
    lines = [
        "| GPUs, arithmetic, kernel | " + " | ".join(f"D = {d}" for d in HEAD_DIMS) + " |",
        "| --- " * (1 + len(HEAD_DIMS)) + "|",
    ]
    for name, line in cells.items():
        shown: list[str] = []
        for of_head_dim in line.values():
            block_m, block_n, warps, stages = of_head_dim[0]["config"]
            registers = max(row["registers"] for row in of_head_dim)
            shared = max(row["shared_bytes"] for row in of_head_dim)
            shown.append(
                f"{block_m}×{block_n}, {warps}, {stages}: {registers}, {shared / 1024:.0f}"
            )
        lines.append(f"| {', '.join(name)} | {' | '.join(shown)} |")
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    return "\n".join([before + BEGIN, "", *lines, "", END + after])


def main(arguments: list[str] | None = None) -> int:
    """Compile what is missing, or with `--check` look at what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    import triton
    from dilated_kernels.fused.configs import tabled_config

    recorded: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    is_current = recorded.get("sources") == sources_hash()
    rows: dict[str, dict[str, Any]] = recorded.get("rows", {}) if is_current else {}
    if not options.check:
        if recorded.get("triton") != triton.__version__:
            rows = {}
        import torch

        todo = [
            one
            for one in specializations()
            if rows.get(key(one), {}).get("config")
            != list(tabled_config(one[0], getattr(torch, one[1]), one[3], one[4], one[2]))  # pyright: ignore[reportArgumentType]
        ]
        context = multiprocessing.get_context("spawn")
        with context.Pool(options.processes) as pool:
            for i, (name, row) in enumerate(pool.imap_unordered(compile_one, todo)):
                rows[name] = row
                if i % 20 == 19 or i + 1 == len(todo):
                    print(f"{i + 1} of {len(todo)}: {name}: {row}", flush=True)
                    write(triton.__version__, rows)
        write(triton.__version__, rows)
    elif not is_current:
        print("the kernels changed since they were compiled; run python -m tools.kernel_resources")
        return 1
    for problem in (found := problems(rows)):
        print(problem)
    if found:
        return 1
    if not options.check:
        PAGE.write_text(page(rows))
    elif PAGE.read_text() != page(rows):
        print("docs/kernels.md shows other numbers; run python -m tools.kernel_resources")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
