"""Search tile sizes, warps and pipeline stages for the fused kernels.

Forward is timed by itself. A config of `dq` or `dk_dv` is timed within the whole backward pass, the
other kernels keeping theirs, in turn with the table's own config. Results are compared with those
of the table's config first. What is measured already, as the file says, is not measured again, so a
search can go on where it was stopped. Nothing is edited: the table is
packages/dilated-kernels/src/dilated_kernels/fused/configs.py.

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
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    register_backend,
    unregister_backend,
)
from dilated_core.testing.error_budget import relative_error
from dilated_kernels.fused.backend import TritonBackend
from dilated_kernels.fused.configs import Config
from gpu_contenders import FUSED
from gpu_timing import describe_failure, time_in_rounds, write_json

KINDS = ("forward", "dq", "dk_dv")
# Two ways of adding up the same bf16 products; a miscompiled kernel is off by far more.
SAME = 0.01
CONFIGS = [
    Config(block_m, block_n, warps, stages)
    for (block_m, block_n), warps, stages in itertools.product(
        [(32, 64), (64, 32), (64, 64), (32, 128), (128, 32), (128, 64), (64, 128), (128, 128)],
        (4, 8),
        (2, 3, 4),
    )
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
        shape = (1, self.seq_len, self.num_heads, self.head_dim)
        dtype = getattr(torch, self.dtype)
        return [
            torch.randn(shape, device=self.device, dtype=dtype, generator=generator).requires_grad_(
                name != "dout"
            )
            for name in ("q", "k", "v", "dout")
        ]

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: str = FUSED
    ) -> torch.Tensor:
        """The fused kernels."""
        return dilated_attention(q, k, v, self.pattern(), is_causal=self.is_causal, backend=backend)


@contextmanager
def configured(kind: str, config: Config | None) -> Iterator[str]:
    """Within this, a backend whose kernels of one kind have this config; yields its name.

    With None it is the fused backend itself, with the configs of the table.
    """
    if config is None:
        yield FUSED
        return
    register_backend(TritonBackend(configs={kind: config}, name="tuning"))
    try:
        yield "tuning"
    finally:
        unregister_backend("tuning")


def results(
    problem: Problem, kind: str, inputs: list[torch.Tensor], backend: str = FUSED
) -> list[torch.Tensor]:
    """What a kernel of this kind has a part in."""
    *leaves, dout = inputs
    if kind == "forward":
        with torch.no_grad():
            return [problem.attend(*leaves, backend)]
    return list(torch.autograd.grad(problem.attend(*leaves, backend), leaves, dout))


def prepare(problem: Problem, kind: str, config: Config) -> None:
    """Run once, in a process of its own, so that the compiled kernel is in Triton's cache."""
    with configured(kind, config) as backend:
        results(problem, kind, problem.inputs(), backend)


def compare(
    problem: Problem, kind: str, config: Config, inputs: list[torch.Tensor]
) -> dict[str, Any]:
    """Time a config in turn with the table's, after comparing their results."""
    device = torch.device(problem.device)
    expected = results(problem, kind, inputs)
    with configured(kind, config) as backend:
        actual = results(problem, kind, inputs, backend)
    error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
    if not error <= SAME:
        return {"failed": f"wrong result: relative error {error:.2e}"}
    *leaves, dout = inputs

    def call(config: Config | None) -> Any:
        with configured(kind, config) as backend:
            # Backward runs the backend of forward, also when it is no longer registered.
            out = None if kind == "forward" else problem.attend(*leaves, backend)

        def run(_: int) -> None:
            if out is not None:
                torch.autograd.grad(out, leaves, dout, retain_graph=True)
                return
            with configured(kind, config) as backend:
                results(problem, kind, inputs, backend)

        return run

    spreads = time_in_rounds(
        {"table": call(None), "config": call(config)}, device, seconds=0.4, max_rounds=9
    )
    ms = {name: spread["median_ms"] for name, spread in spreads.items()}
    return {
        "ms": ms["config"],
        "table_ms": ms["table"],
        "gain": round(ms["table"] / ms["config"], 4),
    }


def tune(
    problem: Problem,
    kinds: list[str],
    configs: list[Config],
    rows: list[dict[str, Any]],
    *,
    deadline: float,
    workers: int,
) -> Iterator[None]:
    """Add a row per kind and config to `rows`, as far as they are new; yields after each."""
    known = {(row["kind"], *row["config"], *_key(row["problem"])) for row in rows}
    wanted = [
        (kind, config)
        for kind in kinds
        for config in configs
        if (kind, *config, *problem) not in known
    ]
    if wanted and workers:
        spawn = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, mp_context=spawn)
        futures = [pool.submit(prepare, problem, kind, config) for kind, config in wanted]
        # What does not compile here will say so again below; timing waits until the GPU is idle.
        wait(futures, timeout=max(0.0, deadline - time.monotonic()))
        pool.shutdown(cancel_futures=True)
    inputs = problem.inputs()
    for kind, config in wanted:
        if time.monotonic() > deadline:
            return
        row = {"problem": problem._asdict(), "kind": kind, "config": list(config)}
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
        groups.setdefault((*_key(row["problem"]), row["kind"]), []).append(row)
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


def _key(problem: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(problem[name] for name in Problem._fields)


def _config(text: str) -> Config:
    return Config(*map(int, text.split(",")))


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
    parser.add_argument(
        "--configs", nargs="+", type=_config, metavar="M,N,WARPS,STAGES", default=CONFIGS
    )
    parser.add_argument("--workers", type=int, default=8, help="processes that compile; 0: none")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    result: dict[str, Any] = {"rows": []}
    if options.json.exists():
        result = json.loads(options.json.read_text())
    problems = [
        Problem(D, dtype, bool(c), options.seq_len, options.w0, options.num_heads, options.device)
        for D in options.head_dim
        for dtype in options.dtype
        for c in options.causal
    ]
    for problem in problems:
        for _ in tune(
            problem,
            options.kinds,
            options.configs,
            result["rows"],
            deadline=deadline,
            workers=options.workers,
        ):
            write_json(options.json, result)
        print(f"{problem}: {len(result['rows'])} rows in all", flush=True)
    print("\n".join(best_lines(result["rows"])))


if __name__ == "__main__":
    main()
