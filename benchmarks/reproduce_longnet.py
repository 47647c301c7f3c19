"""The LongNet paper scaled down: `python benchmarks/reproduce_longnet.py --help`.

Parts: latency (figure 5), strided (whether branches with rates above 1 learn to copy), quality
(table 2, figure 7b, and exact against detached mixing weights). Each seed is a process of one
thread. What it measured is kept in runs/longnet_paper/, by commit and scale, so a command that was
stopped goes on where it was; results/longnet_paper_PART.json holds the finished seeds.
`--scale 2` has twice the lengths, wider and deeper models, and four times the tokens.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, environment, write_result
from longnet_paper import latency, quality, strided
from longnet_paper.sizes import Size

RESULTS = Path(__file__).parent / "results"


def contenders(part: str, size: Size) -> list[str]:
    """Names of what one seed trains."""
    return list(quality.contenders(size) if part == "quality" else strided.CONTENDERS)


def row_file(folder: Path, name: str, seed: int) -> Path:
    """Where the row of a training is kept."""
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def run_seed(part: str, seed: int, size: Size, device: str, folder: Path) -> None:
    """Train and score each contender that has no row yet."""
    torch.set_num_threads(1)
    measure = quality.measure if part == "quality" else strided.measure
    folder.mkdir(parents=True, exist_ok=True)
    for name in contenders(part, size):
        out = row_file(folder, name, seed)
        if not out.exists():
            partial = out.with_suffix(".partial")
            partial.write_text(json.dumps(measure(name, seed, size, device)))
            partial.rename(out)
        print(f"{part}: {name}, seed {seed}", flush=True)


def run_part(part: str, size: Size, device: str, seeds: Sequence[int]) -> None:
    """Run each seed in a process, and write the result after each."""
    name = f"longnet_paper_{part}"
    if part == "latency":
        write_result(RESULTS / f"{name}.json", name, latency.measure_all(size))
        return
    state = environment()
    if state["uncommitted_changes"]:
        raise SystemExit("there are uncommitted changes; commit them, because rows name a commit.")
    folder = ROOT / "runs" / "longnet_paper" / f"{state['commit']}-scale-{size.scale}" / part
    rows: list[dict[str, Any]] = []
    for seed in seeds:
        common = [part, "--scale", str(size.scale), "--device", device]
        process = [sys.executable, __file__, *common, "--seeds", str(seed), "--rows", str(folder)]
        subprocess.run(process, check=True)
        rows += [
            json.loads(row_file(folder, contender, seed).read_text())
            for contender in contenders(part, size)
        ]
        torch.set_num_threads(1)  # as in the trainings, because `environment` records it
        write_result(RESULTS / f"{name}.json", name, rows)


def main() -> None:
    """Run the parts that the command line names."""
    parts = ["latency", "strided", "quality"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(parts)}; default all")
    parser.add_argument("--scale", type=int, default=1, help="1 to 16; 16 has the paper's lengths")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # in the process of a seed
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; name some of {parts}")
    size = Size(options.scale)
    for part in options.parts or parts:
        if options.rows:
            run_seed(part, options.seeds[0], size, options.device, options.rows)
        else:
            run_part(part, size, options.device, options.seeds)


if __name__ == "__main__":
    main()
