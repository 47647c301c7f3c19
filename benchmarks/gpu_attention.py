"""Dilated attention on a GPU against dense attention and against gather-attention-scatter.

Every row is one shape. All contenders (gpu_contenders.py) are timed in turn in this process,
forward without gradients and forward+backward, and only those whose result is right on this very
shape (gpu_oracle.py). What the rows mean for the project's goals is in gpu_goals.py.

Run `python benchmarks/gpu_attention.py --help`; with --device cpu it runs tiny shapes through
Triton's interpreter, which says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern, dilated_attention_with_lse
from gpu_contenders import (
    HILBERT,
    Contender,
    dense_contenders,
    gather_contenders,
    pattern_contender,
    register_tile_orders,
    runnable_backends,
)
from gpu_goals import format_row, goals, ratios
from gpu_machine import describe
from gpu_oracle import Call, sampled_errors
from gpu_timing import describe_failure, peak_bytes_above, time_in_rounds, write_json

# A wrong result is off by its own size; rounding in half precision stays far below this, also that
# of paths which round more often. The budgets of accuracy are tested elsewhere.
WRONG = 0.03
# Dense attention that would take longer for one forward pass is not timed: what it would show, the
# shorter sequences show, and the machine is lent by the minute. Nor is dense attention at equal
# FLOPs on inputs of its own beyond this size, which the other contenders need the memory for.
MAX_FORWARD_S = 0.15
MAX_OWN_INPUT_BYTES = 8 * 2**30
# The choice of a backend depends on the length only where attention is dense or nearly so.
AUTO_UP_TO = 2**14
# For that estimate, and for nothing that is reported.
EXPECTED_FLOPS_PER_S = 4e14
# Contenders whose kernels, compiled anew for each shape, would take the time of all others.
SLOW_TO_COMPILE = (HILBERT, "flex")
PARTS = {"forward": 1.0, "forward_backward": 3.5}


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
# The most telling first: whoever runs out of time keeps those.
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
    *(
        Case(S, num_heads=16, head_dim=128, extras=SLOW_TO_COMPILE[: S > M])
        for S in (8 * K, 256 * K, 2 * M)
    ),
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
    row: dict[str, Any] = {
        **case._asdict(),
        "device": device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "segment_lengths": list(pattern.segment_lengths),
        "dilation_rates": list(pattern.dilation_rates),
        "forward_flops": flops,
        "contenders": {name: {"not_timed": note} for name, note in notes.items()},
    }
    result = row["contenders"]
    inputs: dict[tuple[int, ...], list[tuple[torch.Tensor, ...]]] = {}
    calls: dict[str, _Calls] = {}
    lse: torch.Tensor | None = None
    for name, contender in contenders.items():
        own_shape = contender.shape or shape
        if note := _too_large(contender, dtype):
            result[name] = {"not_timed": note}
            continue
        try:
            if own_shape not in inputs:
                inputs[own_shape] = _inputs(own_shape, device, dtype)
            if lse is None and contender.computes == "pattern":
                lse = _lse(inputs[own_shape][0], pattern, case.is_causal)
            timed = _Calls(contender, inputs[own_shape])
            result[name] = _check_and_warm_up(timed, pattern, case.is_causal, lse, device)
            if "failed" not in result[name]:
                calls[name] = timed
        except torch.OutOfMemoryError:
            result[name] = {"not_timed": "out of memory"}
        except Exception as error:  # a compiler fails in many ways; no other row must suffer
            result[name] = {"failed": describe_failure(error, name, device)}
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    for part, factor in PARTS.items():
        times = time_in_rounds(
            {name: getattr(timed, part) for name, timed in calls.items()},
            device,
            seconds=seconds / len(PARTS),
        )
        for name, spread in times.items():
            tflops = factor * contenders[name].flops / spread["median_ms"] / 1e9
            result[name][part] |= {**spread, "tflops": float(f"{tflops:.4g}")}
    row["ratios"] = ratios(row)
    output_bytes = S * H * D * dtype.itemsize
    row["memory_goal_bytes"] = output_bytes + S * H * 4 + S * H * D * 4
    return row


def _contenders(
    case: Case, pattern: DilatedPattern, device: torch.device, dtype: torch.dtype, flops: int
) -> tuple[dict[str, Contender], dict[str, str]]:
    """The contenders of a row, and why there are no others."""
    S, H, D = case.seq_len, case.num_heads, case.head_dim
    names, notes = runnable_backends(device, dtype, S, H, D)
    if S <= AUTO_UP_TO:
        names.append("auto")
    names = [name for name in names if name not in SLOW_TO_COMPILE or name in case.extras]
    found = {name: pattern_contender(name, pattern, case.is_causal, flops) for name in names}
    found |= dense_contenders(device, (1, S, H, D), case.w0, case.is_causal, flops)
    gather, why_not = gather_contenders(device, pattern, S, case.is_causal, flops)
    found |= gather
    if why_not is not None:
        notes["gather_flash"] = why_not
    return found, notes


def _inputs(
    shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
) -> list[tuple[torch.Tensor, ...]]:
    """Sets of q, k, v, dout: so many that one set is out of the cache when its turn comes."""
    B, S, H, D = shape
    set_bytes = 4 * B * S * H * D * dtype.itemsize
    l2_bytes = (
        torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    )
    count = max(1, min(16, -(-3 * l2_bytes // set_bytes)))
    generator = torch.Generator(device).manual_seed(0)
    return [
        tuple(
            torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_(
                name != "dout"
            )
            for name in ("q", "k", "v", "dout")
        )
        for _ in range(count)
    ]


def _too_large(contender: Contender, dtype: torch.dtype) -> str | None:
    """Why a contender is not even tried, if so."""
    if contender.computes != "other":
        return None
    if contender.flops > MAX_FORWARD_S * EXPECTED_FLOPS_PER_S:
        return f"about {contender.flops / EXPECTED_FLOPS_PER_S:.1f} s a forward pass"
    own_bytes = 4 * math.prod(contender.shape or (0,)) * dtype.itemsize
    if own_bytes > MAX_OWN_INPUT_BYTES:
        return f"{own_bytes / 2**30:.0f} GiB of inputs of its own"
    return None


class _Calls(NamedTuple):
    """A contender on its inputs, as the calls to time."""

    contender: Contender
    sets: list[tuple[torch.Tensor, ...]]

    def forward(self, i: int) -> torch.Tensor:
        q, k, v, _ = self.sets[i % len(self.sets)]
        with torch.no_grad():
            return self.contender.attend(q, k, v)

    def forward_backward(self, i: int) -> tuple[torch.Tensor, ...]:
        q, k, v, dout = self.sets[i % len(self.sets)]
        out = self.contender.attend(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))


def _check_and_warm_up(
    calls: _Calls,
    pattern: DilatedPattern,
    is_causal: bool,
    lse: torch.Tensor | None,
    device: torch.device,
) -> dict[str, Any]:
    """Errors and peak memory of a contender; "failed" if its results are wrong.

    Gradients are compared only where they are meant to be exact.
    """
    result: dict[str, Any] = {}
    if calls.contender.computes != "other":
        q, k, v, dout = calls.sets[0]
        out, *grads = calls.forward_backward(0)
        if calls.contender.computes != "pattern":
            grads, lse = [None, None, None], None
        call = Call(q, k, v, dout, out, lse, *grads)
        errors = sampled_errors(call, pattern, is_causal=is_causal, num_positions=16, num_heads=2)
        result["errors"] = {key: float(f"{error:.3g}") for key, error in errors.items()}
        del out, grads, call
        if not all(error <= WRONG for error in errors.values()):
            return {**result, "failed": f"wrong result: {result['errors']}"}
    for part in PARTS:
        if calls.contender.computes == "other" or part == "forward":
            getattr(calls, part)(0)  # compiles or loads what the measured call must not
        result[part] = {"peak_bytes": peak_bytes_above(getattr(calls, part), device)}
    return result


def _lse(
    tensors: tuple[torch.Tensor, ...], pattern: DilatedPattern, is_causal: bool
) -> torch.Tensor:
    """The lse that dk and dv are checked with: PyTorch's, so that no contender brings its own."""
    q, k, v, _ = tensors
    with torch.no_grad():
        return dilated_attention_with_lse(q, k, v, pattern, is_causal=is_causal, backend="sdpa").lse


def run(
    cases: list[Case], device: torch.device, *, deadline: float, seconds: float
) -> Iterator[dict[str, Any]]:
    """The rows, one after another, until `deadline` on the clock `time.monotonic`."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in cases:
        if time.monotonic() > deadline:
            return
        yield measure(case, device, dtype, seconds=seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--quick", action="store_true", help="only the most telling rows")
    parser.add_argument("--seconds", type=float, default=180, help="start no row after this")
    parser.add_argument("--row-seconds", type=float, default=4, help="time for timing one row")
    parser.add_argument("--seq-len", type=int, nargs="*", help="only these lengths")
    parser.add_argument("--head-dim", type=int, nargs="*", help="only these head dimensions")
    parser.add_argument("--w0", type=int, nargs="*", help="only these first segments")
    parser.add_argument("--commit", help="what to record if there is no git repository to ask")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    cases = CPU_CASES if device.type == "cpu" else QUICK_CASES if options.quick else CASES
    wanted = {"seq_len": options.seq_len, "head_dim": options.head_dim, "w0": options.w0}
    cases = [
        case
        for case in cases
        if all(not values or getattr(case, name) in values for name, values in wanted.items())
    ]
    result: dict[str, Any] = {
        "benchmark": "gpu_attention",
        "environment": describe(device, options.commit),
        "tile_orders_missing": register_tile_orders(),
        "rows": [],
    }
    for row in run(cases, device, deadline=deadline, seconds=options.row_seconds):
        result["rows"].append(row)
        write_json(options.json, {**result, "goals": goals(result["rows"])})
        print(format_row(row), flush=True)
        for name, contender in row["contenders"].items():
            if "failed" in contender:
                print(f"  {name} failed: {contender['failed']}", flush=True)
    skipped = len(cases) - len(result["rows"])
    if skipped:
        print(f"{skipped} rows not measured: out of time")
    result |= {"goals": goals(result["rows"]), "rows_not_measured": skipped, "complete": True}
    write_json(options.json, result)
    for goal in result["goals"]:
        print(f"{goal['goal']}: {goal['met']} ({goal['evidence']})")


if __name__ == "__main__":
    main()
