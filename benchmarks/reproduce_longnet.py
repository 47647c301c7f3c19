"""The LongNet paper scaled down: `python benchmarks/reproduce_longnet.py --help`.

Parts: latency (figure 5), strided (whether branches with rates above 1 learn to copy), quality
(table 2, figure 7b, and exact against detached mixing weights). Each training is a process of
one thread. What it measured is kept in runs/longnet_paper/, by scale and commit, so a command that
was stopped goes on where it was; results/longnet_paper_PART.json holds the finished seeds.
`--scale 2` has twice the lengths, wider and deeper models, and four times the tokens.
"""

from __future__ import annotations

import argparse
import importlib
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

FOLDER = Path(__file__).parent


def jobs(part: str, size: Size, seeds: Sequence[int]) -> list[tuple[str, int]]:
    """Contender and seed of each training, seed by seed."""
    names = quality.contenders(size) if part == "quality" else strided.CONTENDERS
    return [(name, seed) for seed in seeds for name in names]


def run_one(part: str, name: str, seed: int, size: Size, device: str, out: Path) -> None:
    """Measure one contender with one seed and write its row."""
    torch.set_num_threads(1)
    row = importlib.import_module(f"longnet_paper.{part}").measure(name, seed, size, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(row))
    partial.rename(out)


def run_part(part: str, size: Size, device: str, seeds: Sequence[int]) -> None:
    """Run what has no row yet, each in a process, and write the result after every seed."""
    result = FOLDER / "results" / f"longnet_paper_{part}.json"
    if part == "latency":
        write_result(result, f"longnet_paper_{part}", latency.measure_all(size))
        return
    state = environment()
    if state["uncommitted_changes"]:
        raise SystemExit("there are uncommitted changes; commit them, because rows name a commit.")
    folder = ROOT / "runs" / "longnet_paper" / f"{state['commit']}-scale-{size.scale}" / part
    rows: list[dict[str, Any]] = []
    listed = jobs(part, size, seeds)
    for done, (name, seed) in enumerate(listed, start=1):
        out = folder / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}.json"
        if not out.exists():
            arguments = ["--job", name, "--seed", str(seed), "--out", str(out)]
            common = [part, "--scale", str(size.scale), "--device", device]
            subprocess.run([sys.executable, __file__, *common, *arguments], check=True)
        rows.append(json.loads(out.read_text()))
        print(f"{part}: {done} of {len(listed)}: {name}, seed {seed}", flush=True)
        if done % (len(listed) // len(seeds)) == 0:
            torch.set_num_threads(1)  # of the trainings, which `environment` records
            write_result(result, f"longnet_paper_{part}", rows)


def main() -> None:
    """Run the parts that the command line names."""
    parts = ["latency", "strided", "quality"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(parts)}; default all")
    parser.add_argument("--scale", type=int, default=1, help="1 to 16; 16 has the paper's lengths")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts) - set(parts):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; name some of {parts}")
    size = Size(options.scale)
    for part in options.parts or parts:
        if options.job:
            run_one(part, options.job, options.seed, size, options.device, options.out)
        else:
            run_part(part, size, options.device, options.seeds)


if __name__ == "__main__":
    main()
