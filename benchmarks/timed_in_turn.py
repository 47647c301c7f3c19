"""`dilated_attention` of this checkout and of another one, timed in turn: `compare.py --timed`.

Three processes time the same calls, one for this checkout and two for the other. `ratio` above 1
says that this checkout is faster. `control_ratio` compares the two processes of the other commit:
what differs from 1 there is the machine. One thread gives the steadiest times.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness import write_result

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
            [sys.executable, __file__],
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

    def stop(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a worker ended; its error is above")
        return line


def in_turn(workers: dict[str, Worker], case: int, part: str, rounds: int) -> dict[str, Any]:
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


def time_cases(
    base: Path, rounds: int, cases: list[int] | None, out: Path | None
) -> list[dict[str, Any]]:
    """Time all cases, or those of the given numbers; write them to `out` after the last one."""
    folders = {"base": base, "here": ROOT, "control": base}
    workers = {name: Worker(folder) for name, folder in folders.items()}
    rows: list[dict[str, Any]] = []
    for case in range(len(CASES)) if cases is None else cases:
        for part in PARTS:
            rows.append(in_turn(workers, case, part, rounds))
            print(rows[-1], file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.stop()
    if out is not None:
        commit = ["git", "rev-parse", "--short", "HEAD"]
        base_commit = subprocess.check_output(commit, cwd=base, text=True).strip()
        recorded = [{"base_commit": base_commit, "pattern": PATTERN, **row} for row in rows]
        write_result(out, "against_commit", recorded)
    return rows


if __name__ == "__main__":
    serve()
