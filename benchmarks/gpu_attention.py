"""Dilated attention on a GPU against dense attention and against gather-attention-scatter.

Every row is one shape. All contenders (gpu_contenders.py) are timed in turn in this process,
forward without gradients and forward+backward, and only those whose result is right on this very
shape. The verdict on the project's goals is in gpu_goals.py.

With --device cpu one tiny shape runs in Triton's interpreter, which proves nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern, dilated_attention_with_lse
from dilated_core.testing import errors_at_drawn_positions
from gpu_contenders import (
    HILBERT,
    Contender,
    dense_contenders,
    gather_contender,
    pattern_contender,
    register_tile_orders,
    runnable_backends,
)
from gpu_goals import format_row, goals, ratios
from gpu_timing import describe_failure, peak_bytes_above, time_in_turn, write_json

# A wrong result is off by its own size; rounding in half precision stays far below this.
WRONG = 0.03
# Dense attention that would take longer for one forward pass is not timed: the shorter sequences
# show the same.
MAX_FORWARD_S = 0.15
EXPECTED_FLOPS_PER_S = 4e14  # for that estimate, and for nothing that is reported
# Their kernels, compiled anew for each shape, would take the time of all others.
SLOW_TO_COMPILE = (HILBERT, "flex")
FLOP_FACTORS = {"forward": 1.0, "forward_backward": 3.5}


class Case(NamedTuple):
    """One row.

    Attributes:
        seq_len: S.
        w0: Segment length of the first branch; the others double it, and their rate.
        num_heads: H.
        head_dim: D.
        is_causal: As usual.
        is_paper: The paper's rates 1, 2, 4, 6, 12 instead of powers of two.
        extras: Those of `SLOW_TO_COMPILE` that run in this row.
    """

    seq_len: int
    w0: int = 2048
    num_heads: int = 12
    head_dim: int = 64
    is_causal: bool = False
    is_paper: bool = False
    extras: tuple[str, ...] = ()

    def pattern(self) -> DilatedPattern:
        """As many branches as the sequence has room for; at most five with the paper's rates."""
        lengths = [self.w0 * 2**i for i in range(40) if i == 0 or self.w0 * 2**i <= self.seq_len]
        rates = [1, 2, 4, 6, 12] if self.is_paper else [2**i for i in range(40)]
        count = min(len(lengths), len(rates))
        return DilatedPattern(lengths[:count], rates[:count])


K, M = 2**10, 2**20
# The most telling first: a run that is out of time has those.
CASES = [
    *(Case(64 * K, head_dim=D, is_causal=c) for D in (64, 128) for c in (False, True)),
    Case(16 * K, extras=SLOW_TO_COMPILE),
    *(Case(S, is_causal=True) for S in (8 * K, 128 * K, 2 * K)),
    Case(4 * M, is_causal=True, extras=(HILBERT,)),
    *(Case(S, num_heads=16, head_dim=128, is_causal=True) for S in (16 * K, M)),
    *(Case(64 * K, w0=w0, is_causal=c) for w0 in (512, 128) for c in (False, True)),
    *(Case(S, is_causal=True) for S in (32 * K, 256 * K, 512 * K, M, 2 * M, 4 * K)),
    Case(64 * K, is_paper=True, is_causal=True),
    *(Case(S, extras=SLOW_TO_COMPILE[: S == 256 * K]) for S in (8 * K, 256 * K, 32 * K, 4 * M)),
    *(Case(S, num_heads=16, head_dim=128) for S in (8 * K, 256 * K, 2 * M)),
]
QUICK_CASES = CASES[:6]
CPU_CASES = [Case(32, w0=16, num_heads=2, head_dim=16, is_causal=True, extras=(HILBERT,))]


def measure(
    case: Case, device: torch.device, dtype: torch.dtype, *, seconds: float
) -> dict[str, Any]:
    """One row: what each contender took, or why it was not timed."""
    S, H, D = case.seq_len, case.num_heads, case.head_dim
    pattern, shape = case.pattern(), (1, S, H, D)
    flops = pattern.flops(S, H, D, is_causal=case.is_causal)
    contenders, notes = _contenders(case, pattern, device, dtype, flops)
    result: dict[str, Any] = {name: {"not_timed": note} for name, note in notes.items()}
    q, k, v, _ = inputs = _inputs(shape, device, dtype)
    with torch.no_grad():  # PyTorch's lse, so that no contender brings its own
        lse = dilated_attention_with_lse(
            q, k, v, pattern, is_causal=case.is_causal, backend="sdpa"
        ).lse
    calls: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        try:
            own = inputs if contender.shape is None else _inputs(contender.shape, device, dtype)
            parts = {part: partial(run, contender, own) for part, run in RUNS.items()}
            result[name] = _check(contender, parts, own, lse, pattern, case.is_causal)
            if "failed" not in result[name]:
                for part, call in parts.items():
                    call()  # compiles or loads what the measured call must not
                    result[name][part] = {"peak_bytes": peak_bytes_above(call, device)}
                calls[name] = parts
        except torch.OutOfMemoryError:
            result[name] = {"not_timed": "out of memory"}
        except Exception as error:  # a compiler fails in many ways; no other row must suffer
            result[name] = {"failed": describe_failure(error, name, device)}
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    for part, factor in FLOP_FACTORS.items():
        timed = {name: parts[part] for name, parts in calls.items()}
        spreads = time_in_turn(timed, device, seconds=seconds / len(RUNS))
        for name, spread in spreads.items():
            tflops = factor * contenders[name].flops / spread["median_ms"] / 1e9
            result[name][part] |= {**spread, "tflops": float(f"{tflops:.4g}")}
    row: dict[str, Any] = {
        **case._asdict(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "segment_lengths": list(pattern.segment_lengths),
        "dilation_rates": list(pattern.dilation_rates),
        "forward_flops": flops,
        "memory_goal_bytes": S * H * (D * dtype.itemsize + 4 + D * 4),
        "contenders": result,
    }
    return row | {"ratios": ratios(row)}


def _contenders(
    case: Case, pattern: DilatedPattern, device: torch.device, dtype: torch.dtype, flops: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders of a row, and why there are no others."""
    S, H, D = case.seq_len, case.num_heads, case.head_dim
    names, notes = runnable_backends(device, dtype, S, H, D)
    names = [name for name in names if name not in SLOW_TO_COMPILE or name in case.extras]
    found = {
        name: pattern_contender(name, pattern, case.is_causal, flops) for name in [*names, "auto"]
    }
    for name, contender in dense_contenders(
        device, (1, S, H, D), case.w0, case.is_causal, flops
    ).items():
        if contender.flops > MAX_FORWARD_S * EXPECTED_FLOPS_PER_S:
            seconds = contender.flops / EXPECTED_FLOPS_PER_S
            notes[name] = f"about {seconds:.1f} s for a forward pass"
        else:
            found[name] = contender
    gather = gather_contender(pattern, S, case.is_causal, flops)
    if isinstance(gather, str):
        notes["gather_flash"] = gather
    else:
        found["gather_flash"] = gather
    return found, notes


def _inputs(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    """q, k, v, dout."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(i < 3)
        for i in range(4)
    ]


def _forward(contender: Contender, inputs: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return contender.attend(*inputs[:3])


def _forward_backward(contender: Contender, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    *leaves, dout = inputs
    out = contender.attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


RUNS = {"forward": _forward, "forward_backward": _forward_backward}


def _check(
    contender: Contender,
    parts: dict[str, Any],
    inputs: list[torch.Tensor],
    lse: torch.Tensor,
    pattern: DilatedPattern,
    is_causal: bool,
) -> dict[str, Any]:
    """Errors of a contender at drawn positions; "failed" if its results are wrong.

    Gradients are compared only where they are meant to be exact.
    """
    if contender.computes == "other":
        return {}
    names = ("out", "dq", "dk", "dv") if contender.computes == "pattern" else ("out",)
    results = dict(zip(names, parts["forward_backward"](), strict=False)) | {"lse": lse}
    errors = errors_at_drawn_positions(
        *inputs, results, pattern, is_causal=is_causal, num_positions=16, num_heads=2
    )
    shown = {name: float(f"{error:.3g}") for name, error in errors.items()}
    if all(error <= WRONG for error in errors.values()):
        return {"errors": shown}
    return {"errors": shown, "failed": f"wrong result: {shown}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--quick", action="store_true", help="only the most telling rows")
    parser.add_argument("--seconds", type=float, default=180, help="start no row after this")
    parser.add_argument("--row-seconds", type=float, default=4, help="time for timing one row")
    parser.add_argument("--seq-len", type=int, nargs="*", help="only these lengths")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = CPU_CASES if device.type == "cpu" else QUICK_CASES if options.quick else CASES
    cases = [case for case in cases if not options.seq_len or case.seq_len in options.seq_len]
    register_tile_orders()
    rows: list[dict[str, Any]] = []
    for case in cases:
        if time.monotonic() > deadline:
            break
        rows.append(row := measure(case, device, dtype, seconds=options.row_seconds))
        result = {"rows": rows, "goals": goals(rows), "rows_not_measured": len(cases) - len(rows)}
        write_json(options.json, result)
        print(format_row(row), flush=True)
        for name, contender in row["contenders"].items():
            if "failed" in contender:
                print(f"  {name} failed: {contender['failed']}", flush=True)
    for goal in goals(rows):
        print(f"goal met: {goal['met']}: {goal['goal']} ({goal['evidence']})")
    if len(rows) < len(cases):
        print(f"{len(cases) - len(rows)} rows not measured: out of time")


if __name__ == "__main__":
    main()
