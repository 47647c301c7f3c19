"""Search tile sizes, warps and pipeline stages for the fused kernels.

A config of one kernel is timed within the whole forward or backward pass, in turn with the table's
own config, after their results are compared. A search continues an earlier one from its
file. Nothing is edited: the table is packages/dilated-kernels/src/dilated_kernels/fused/
configs.py.

Run `python tools/gpu_check.py --json FILE --seconds 500 --tune [options of this script]`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern, dilated_attention, register_backend, unregister_backend
from dilated_core.testing import relative_error
from dilated_kernels.fused import TritonBackend
from dilated_kernels.fused.tuning import Config
from gpu_contenders import FUSED
from gpu_timing import describe_failure, time_in_turn, write_json

KINDS = ("forward", "dq", "dk_dv")
# Two ways of adding up the same bf16 products; a miscompiled kernel is off by far more.
SAME = 0.01
TILES = [(32, 64), (64, 32), (64, 64), (32, 128), (128, 32), (128, 64), (64, 128), (128, 128)]
CONFIGS = [
    Config(*tiles, warps, stages)
    for tiles, warps, stages in itertools.product(TILES, (4, 8), (2, 3, 4))
]


class Problem(NamedTuple):
    """What to tune for."""

    head_dim: int
    dtype: str
    is_causal: bool
    seq_len: int
    w0: int
    num_heads: int
    device: str

    def pattern(self) -> DilatedPattern:
        """Up to five branches."""
        rates = [2**i for i in range(5) if i == 0 or self.w0 * 2**i <= self.seq_len]
        return DilatedPattern([self.w0 * r for r in rates], rates)

    def inputs(self) -> list[torch.Tensor]:
        """q, k, v and dout."""
        generator = torch.Generator(self.device).manual_seed(0)
        shape, dtype = (1, self.seq_len, self.num_heads, self.head_dim), getattr(torch, self.dtype)
        return [
            torch.randn(shape, device=self.device, dtype=dtype, generator=generator).requires_grad_(
                i < 3
            )
            for i in range(4)
        ]


@contextmanager
def configured(kind: str, config: Config) -> Iterator[str]:
    """The name of a backend whose kernels of one kind are cut by `config`, the others as ever."""
    backend = TritonBackend(configs={kind: config}, name="triton_tuned")
    register_backend(backend)
    try:
        yield backend.name
    finally:
        unregister_backend(backend.name)


def run(
    problem: Problem, kind: str, inputs: list[torch.Tensor], backend: str
) -> list[torch.Tensor]:
    """What a kernel of this kind has a part in."""
    *leaves, dout = inputs
    with torch.set_grad_enabled(kind != "forward"):
        out = dilated_attention(
            *leaves, problem.pattern(), is_causal=problem.is_causal, backend=backend
        )
    return [out] if kind == "forward" else list(torch.autograd.grad(out, leaves, dout))


def prepare(problem: Problem, kind: str, config: Config) -> None:
    """Run once, in a process of its own, so that the compiled kernel is in Triton's cache."""
    with configured(kind, config) as backend:
        run(problem, kind, problem.inputs(), backend)


def compare(
    problem: Problem, kind: str, config: Config, inputs: list[torch.Tensor]
) -> dict[str, Any]:
    """Time a config in turn with the table's, after comparing their results."""
    with configured(kind, config) as tuned:
        calls = {
            name: lambda backend=backend: run(problem, kind, inputs, backend)
            for name, backend in (("table", FUSED), ("config", tuned))
        }
        expected, actual = (call() for call in calls.values())
        error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        if not error <= SAME:
            return {"failed": f"wrong result: relative error {error:.2e}"}
        spreads = time_in_turn(calls, torch.device(problem.device), seconds=0.4)
    ms, table_ms = (spreads[name]["median_ms"] for name in ("config", "table"))
    return {"ms": ms, "table_ms": table_ms, "gain": round(table_ms / ms, 4)}


def tune(
    problem: Problem,
    wanted: list[tuple[str, Config]],
    rows: list[dict[str, Any]],
    *,
    deadline: float,
    workers: int,
) -> Iterator[None]:
    """Add a row per kind and config to `rows`, as far as they are new; yields after each."""
    known = [(row["problem"], row["kind"], row["config"]) for row in rows]
    as_json = problem._asdict()
    wanted = [(kind, c) for kind, c in wanted if (as_json, kind, list(c)) not in known]
    if wanted and workers:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn)
        futures = [pool.submit(prepare, problem, kind, config) for kind, config in wanted]
        # What does not compile fails again below; timing waits until the GPU is idle.
        wait(futures, timeout=max(0.0, deadline - time.monotonic()))
        pool.shutdown(cancel_futures=True)
    inputs = problem.inputs()
    for kind, config in wanted:
        if time.monotonic() > deadline:
            return
        row = {"problem": as_json, "kind": kind, "config": list(config)}
        try:
            row |= compare(problem, kind, config, inputs)
        except Exception as error:  # compilers fail in many ways, and each is a result here
            row["failed"] = describe_failure(error, str(config), torch.device(problem.device))
        rows.append(row)
        yield


def best_lines(rows: list[dict[str, Any]], count: int = 3) -> list[str]:
    """The best configs of each problem and kind, best first, beside the table's own."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((*row["problem"].values(), row["kind"]), []).append(row)
    lines = []
    for (head_dim, dtype, is_causal, *_, kind), found in groups.items():
        timed = sorted((row for row in found if "ms" in row), key=lambda row: -row["gain"])
        best = ", ".join(
            f"{tuple(row['config'])} {row['ms']:.3f} ms ({row['gain']:.3f}x)"
            for row in timed[:count]
        )
        lines.append(
            f"head_dim {head_dim} {dtype}{' causal' if is_causal else ''} {kind}: "
            f"{best or 'nothing ran'}; {len(found) - len(timed)} of {len(found)} failed"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file to read and to add to")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing after this")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--causal", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument("--seq-len", type=int, default=32768)
    parser.add_argument("--w0", type=int, default=2048)
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--configs", nargs="+", metavar="M,N,WARPS,STAGES", help="only these")
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0: none")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    given = [Config(*map(int, text.split(","))) for text in options.configs or ()]
    wanted = list(itertools.product(options.kinds, given or CONFIGS))
    rows: list[dict[str, Any]] = []
    if options.json.exists():
        rows = json.loads(options.json.read_text())["rows"]
    for D, dtype, is_causal in itertools.product(options.head_dim, options.dtype, options.causal):
        problem = Problem(
            *(D, dtype, bool(is_causal), options.seq_len, options.w0, options.num_heads),
            options.device,
        )
        for _ in tune(problem, wanted, rows, deadline=deadline, workers=options.workers):
            write_json(options.json, {"rows": rows})
    print("\n".join(best_lines(rows)))


if __name__ == "__main__":
    main()
