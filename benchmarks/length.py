"""Wall clock and peak memory against length, beside PyTorch's dense attention at the same length.

Causal attention, one sequence, 4 heads of 64, float32: forward without gradients, and forward and
backward. Both contenders run in turn in one process, and the best of up to nine runs counts. Dense
attention is measured up to the length at which a run would take more than a minute; from there its
time is that of the longest measured length, grown with the square of the length, and its memory
grows with the length. Such rows are marked as extrapolated. Run `python benchmarks/length.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core import DilatedPattern, dilated_attention
from equal_flops import check_correctness
from harness import high_water_bytes, peak_memory_in_fresh_process, reset_high_water, write_result
from torch.nn.functional import scaled_dot_product_attention

RESULT = Path(__file__).parent / "results" / "length.json"
PATTERN = DilatedPattern([256, 1024, 4096], [1, 4, 16])
NUM_HEADS, HEAD_DIM = 4, 64
LENGTHS = [4**i for i in range(5, 11)]  # 1,024 to 1,048,576
PARTS = ("forward", "forward_backward")
LONGEST_DENSE_S, SECONDS, ROUNDS = 60.0, 8.0, 9


def attention_call(contender: str, part: str, seq_len: int) -> Callable[[], object]:
    """A call of "dilated" or "dense" on inputs of its own, each in the layout it works best on."""
    torch.manual_seed(0)
    is_dilated = contender == "dilated"
    shape = (1, seq_len, NUM_HEADS, HEAD_DIM) if is_dilated else (1, NUM_HEADS, seq_len, HEAD_DIM)
    q, k, v = (torch.randn(shape) for _ in range(3))

    def attend() -> torch.Tensor:
        if is_dilated:
            return dilated_attention(q, k, v, PATTERN, is_causal=True)
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    if part == "forward":
        return torch.no_grad()(attend)
    dout = torch.randn(shape)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return lambda: torch.autograd.grad(attend(), leaves, dout)


def time_in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, dict[str, Any]]:
    """Time the calls round by round; each stops after `ROUNDS` runs or `SECONDS`.

    A first run that only warms up is not counted, unless it alone takes more than `SECONDS`.
    """
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for round_ in range(ROUNDS + 1):
        for name, call in calls.items():
            if samples[name] and spent[name] > SECONDS:
                continue
            start, cpu_start = time.perf_counter(), time.process_time()
            call()
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            spent[name] += seconds
            if round_ > 0 or seconds > SECONDS:
                samples[name].append((seconds, cpu))
    return {
        name: {
            "best_s": min(seconds for seconds, _ in values),
            "median_s": statistics.median(seconds for seconds, _ in values),
            "best_cpu_s": min(cpu for _, cpu in values),
            "rounds": len(values),
        }
        for name, values in samples.items()
    }


def extrapolated(longest: dict[str, Any], seq_len: int) -> dict[str, Any]:
    """What dense attention would take, from its row at the longest length that was measured."""
    growth = seq_len / longest["seq_len"]
    dense = longest["dense"]
    return {
        "best_s": dense["best_s"] * growth**2,
        "peak_bytes": round(dense["peak_bytes"] * growth),
        "extrapolated": True,
        "from_seq_len": longest["seq_len"],
    }


def measure(part: str, seq_len: int, longest: dict[str, Any] | None) -> dict[str, Any]:
    """One row; `longest` is the last row whose dense attention was measured."""
    row: dict[str, Any] = {
        "part": part,
        "seq_len": seq_len,
        "is_causal": True,
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "segment_lengths": list(PATTERN.segment_lengths),
        "dilation_rates": list(PATTERN.dilation_rates),
        "load": round(os.getloadavg()[0], 2),
    }
    names = ["dilated"]
    if longest is None or extrapolated(longest, seq_len)["best_s"] <= LONGEST_DENSE_S:
        names.append("dense")
    row |= time_in_turn({name: attention_call(name, part, seq_len) for name in names})
    for name in names:
        peak = peak_memory_in_fresh_process("length.py", "--peak", name, part, str(seq_len))
        row[name] |= {**peak, "extrapolated": False}
    if longest is not None and "dense" not in names:
        row["dense"] = extrapolated(longest, seq_len)
    return row


def print_peak(contender: str, part: str, seq_len: int) -> None:
    """Print the peak memory of a call above its inputs, in a process that runs nothing else."""
    # Loads kernels and starts threads, whose memory is not the attention's.
    attention_call(contender, part, 256)()
    call = attention_call(contender, part, seq_len)
    reset_high_water()
    before = high_water_bytes()
    call()
    print(json.dumps({"peak_bytes": high_water_bytes() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="no length above this")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--peak", nargs=3, help="only print the peak of: contender part length")
    options = parser.parse_args()
    if options.peak:
        contender, part, seq_len = options.peak
        print_peak(contender, part, int(seq_len))
        return
    check_correctness(PATTERN, torch.float32, is_causal=True)
    rows: list[dict[str, Any]] = []
    for part in PARTS:
        longest = None
        for seq_len in LENGTHS:
            if seq_len > options.longest:
                break
            rows.append(row := measure(part, seq_len, longest))
            if not row["dense"]["extrapolated"]:
                longest = row
            print(format_row(row), flush=True)
            write_result(options.out, "length", rows)


def format_row(row: dict[str, Any]) -> str:
    """Progress: one line for a row."""
    dilated, dense = row["dilated"], row["dense"]
    return (
        f"{row['part']:<16} S={row['seq_len']:>9,} | dilated {dilated['best_s'] * 1e3:>9,.1f} ms "
        f"{dilated['peak_bytes'] / 2**20:>7,.0f} MiB | dense {dense['best_s'] * 1e3:>11,.1f} ms "
        f"{dense['peak_bytes'] / 2**20:>7,.0f} MiB | load {row['load']}"
        f"{' | dense extrapolated' if dense['extrapolated'] else ''}"
    )


if __name__ == "__main__":
    main()
