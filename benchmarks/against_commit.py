"""dilated_core here against dilated_core in another checkout, such as the commit before.

Three processes time the same calls in turn, one for this checkout and two for the other:
`OMP_NUM_THREADS=1 python benchmarks/against_commit.py --base FOLDER --out
benchmarks/results/against_commit.json`, where FOLDER is a worktree of the other commit. `ratio`
above 1 says that this checkout is faster. `control_ratio` compares the two processes of the other
commit: what differs from 1 there is the machine. One thread gives the steadiest times.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATTERN = ([128, 512, 2048], [1, 4, 16])
CASES = [
    (seq_len, dtype, is_causal)
    for seq_len in (128, 16_384, 65_536)
    for dtype in ("float32",)
    for is_causal in (False, True)
]
PARTS = ("inference", "forward_backward")


def serve() -> None:
    """Answer each line "case part calls" on standard input with the seconds of a call."""
    import torch
    from dilated_core import DilatedPattern, dilated_attention

    print("ready", flush=True)
    pattern = DilatedPattern(*PATTERN)
    tensors: dict[int, list[torch.Tensor]] = {}
    for line in sys.stdin:
        case, part, calls = line.split()
        seq_len, dtype, is_causal = CASES[int(case)]
        if int(case) not in tensors:
            tensors.clear()
            torch.manual_seed(0)
            tensors[int(case)] = [
                torch.randn(1, seq_len, 8, 64, dtype=getattr(torch, dtype)) for _ in range(4)
            ]
        q, k, v, dout = tensors[int(case)]
        leaves = [x.detach().requires_grad_(part != "inference") for x in (q, k, v)]
        start = time.perf_counter()
        for _ in range(int(calls)):
            out = dilated_attention(*leaves, pattern, is_causal=is_causal)
            if part != "inference":
                torch.autograd.grad(out, leaves, dout)
        print((time.perf_counter() - start) / int(calls), flush=True)


class Worker:
    """A process that runs `serve` on the packages of one checkout."""

    def __init__(self, checkout: Path) -> None:
        path = checkout / "packages" / "dilated-core" / "src"
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONPATH": str(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._read()

    def seconds(self, case: int, part: str, calls: int) -> float:
        """Time of one call."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{case} {part} {calls}\n")
        self._process.stdin.flush()
        return float(self._read())

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its error is above")
        return line


def compare(workers: dict[str, Worker], case: int, part: str, rounds: int) -> dict[str, Any]:
    """Median times, and medians and quartiles of the ratios within each round."""
    seq_len, dtype, is_causal = CASES[case]
    calls = 100 if seq_len < 1000 else 1
    times: dict[str, list[float]] = {name: [] for name in workers}
    for i in range(rounds + 1):
        names = list(workers)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds = workers[name].seconds(case, part, calls)
            if i:  # the first round warms up
                times[name].append(seconds)
    row: dict[str, Any] = {
        "seq_len": seq_len,
        "dtype": dtype,
        "is_causal": is_causal,
        "part": part,
        "rounds": rounds,
    }
    row |= {f"{name}_s": statistics.median(values) for name, values in times.items()}
    for name, prefix in (("here", ""), ("control", "control_")):
        ratios = sorted(b / x for b, x in zip(times["base"], times[name], strict=True))
        row |= {
            f"{prefix}ratio": statistics.median(ratios),
            f"{prefix}ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            f"{prefix}fastest_ratio": min(times["base"]) / min(times[name]),
        }
    return row


def main() -> None:
    """Compare all cases and record them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help="checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cases", type=int, nargs="*", default=range(len(CASES)))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    if options.base is None:
        parser.error("--base is missing")
    from harness import write_result

    folders = {"base": options.base, "here": ROOT, "control": options.base}
    workers = {name: Worker(folder) for name, folder in folders.items()}
    rows: list[dict[str, Any]] = []
    for case in options.cases:
        for part in PARTS:
            rows.append(compare(workers, case, part, options.rounds))
            print(rows[-1], flush=True)
    if options.out is not None:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        base_commit = subprocess.check_output(commit, cwd=options.base, text=True).strip()
        rows = [{"base_commit": base_commit, "pattern": PATTERN, **row} for row in rows]
        write_result(options.out, "against_commit", rows)


if __name__ == "__main__":
    main()
