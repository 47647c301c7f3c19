"""Dilated attention against PyTorch's own attention at equal FLOPs, in the same run.

The pattern has five branches (w0·2^i, 2^i): each strip is a problem of w0 rows. Two peers run
PyTorch's `scaled_dot_product_attention` on contiguous tensors, with the FLOPs of the pattern:

- windows: a batch of sequences of w0, as many as give the same FLOPs. The same problem sizes as
  the strips, so what is lost against it is lost to strides, merging and calls.
- square: one sequence long enough for the same FLOPs. PyTorch at its best, which for small w0 is
  faster per FLOP than any attention over w0 keys.

Ratios are rates (FLOPs per second) of dilated attention over the peer's. Before anything is timed,
dilated attention is compared with the float64 oracle on a shorter sequence. Run `python
benchmarks/equal_flops.py --help`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core import DilatedPattern, dilated_attention, reference_dilated_attention
from dilated_core.testing.error_budget import assert_within_budget, pytorch_errors
from harness import Contender, peak_memory_in_fresh_process, time_in_turn, write_result
from torch.nn.functional import scaled_dot_product_attention

RESULTS = Path(__file__).parent / "results"
NUM_HEADS, HEAD_DIM, NUM_BRANCHES = 8, 64, 5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CASES = [
    {"seq_len": seq_len, "w0": w0, "dtype": dtype, "is_causal": is_causal}
    for dtype in DTYPES
    for seq_len in (16_384, 65_536)
    for w0 in (128, 512, 2048)
    for is_causal in (False, True)
]


def geometric_pattern(w0: int) -> DilatedPattern:
    steps = [2**i for i in range(NUM_BRANCHES)]
    return DilatedPattern([w0 * step for step in steps], steps)


def check_correctness(pattern: DilatedPattern, dtype: torch.dtype, is_causal: bool) -> None:
    """Raise unless forward and backward stay within the error budget, at 1100 positions."""
    torch.manual_seed(0)
    shape = (1, 1100, NUM_HEADS, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    dout = torch.randn(shape, dtype=dtype)
    out = dilated_attention(q, k, v, pattern, is_causal=is_causal)
    exact = reference_dilated_attention(q, k, v, pattern, is_causal=is_causal)
    assert_within_budget(
        [out, *torch.autograd.grad(out, (q, k, v), dout)],
        [exact, *torch.autograd.grad(exact, (q, k, v), dout.double())],
        pytorch_errors(q, k, v, dout, is_causal=is_causal),
    )


def measure(
    seq_len: int, w0: int, dtype: str, is_causal: bool, *, max_rounds: int, seconds: float
) -> dict[str, Any]:
    """One row of the result: times, rates and ratios of a case."""
    check_correctness(geometric_pattern(min(w0, 256)), DTYPES[dtype], is_causal)
    pattern = geometric_pattern(w0)
    flops = pattern.flops(seq_len, NUM_HEADS, HEAD_DIM, is_causal=is_causal)

    pairs = w0 * (w0 + 1) // 2 if is_causal else w0 * w0
    windows = max(1, round(flops / (4 * HEAD_DIM * NUM_HEADS * pairs)))
    square = math.isqrt(round(flops / (4 * HEAD_DIM * NUM_HEADS) * (2 if is_causal else 1)))
    square_pairs = square * (square + 1) // 2 if is_causal else square * square
    contenders = {
        "dilated": (
            _tensors((1, seq_len, NUM_HEADS, HEAD_DIM), dtype),
            lambda q, k, v: dilated_attention(q, k, v, pattern, is_causal=is_causal),
            flops,
        ),
        "windows": (
            _tensors((windows, NUM_HEADS, w0, HEAD_DIM), dtype),
            lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=is_causal),
            4 * HEAD_DIM * NUM_HEADS * pairs * windows,
        ),
        "square": (
            _tensors((1, NUM_HEADS, square, HEAD_DIM), dtype),
            lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=is_causal),
            4 * HEAD_DIM * NUM_HEADS * square_pairs,
        ),
    }
    row: dict[str, Any] = {
        "seq_len": seq_len,
        "w0": w0,
        "dtype": dtype,
        "is_causal": is_causal,
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "segment_lengths": list(pattern.segment_lengths),
        "dilation_rates": list(pattern.dilation_rates),
    }
    times = time_in_turn(
        {name: _contender(*tensors, attend) for name, (tensors, attend, _) in contenders.items()},
        max_rounds=max_rounds,
        seconds=seconds,
    )
    for part, factor in (("forward", 1.0), ("forward_backward", 3.5)):
        spreads = {name: parts[part] for name, parts in times.items()}
        rates = {
            name: factor * contenders[name][2] / spread["median_s"]
            for name, spread in spreads.items()
        }
        row[part] = {
            "times": spreads,
            "gflops": {name: round(rate / 1e9, 2) for name, rate in rates.items()},
            "ratio_to_windows": round(rates["dilated"] / rates["windows"], 3),
            "ratio_to_square": round(rates["dilated"] / rates["square"], 3),
        }
    options = [str(seq_len), str(w0), dtype, str(int(is_causal))]
    row["forward_peak"] = peak_memory_in_fresh_process("peak_memory.py", *options)
    return row


def _tensors(shape: tuple[int, ...], dtype: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=DTYPES[dtype]) for _ in range(4)]


def _contender(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    attend: Callable[..., torch.Tensor],
) -> Contender:
    leaves = [x.requires_grad_() for x in (q, k, v)]
    return Contender(lambda: attend(*leaves), lambda out: torch.autograd.grad(out, leaves, dout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--max-rounds", type=int, default=9, help="timed rounds of a contender")
    parser.add_argument("--seconds", type=float, default=60, help="time for a case, but 3 rounds")
    parser.add_argument("--seq-len", type=int, nargs="*", help="only these sequence lengths")
    parser.add_argument("--w0", type=int, nargs="*", help="only these first segment lengths")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--causal", type=int, nargs="*", choices=(0, 1), help="only these")
    parser.add_argument("--out", type=Path, help="results/equal_flops_DTYPE.json if not given")
    options = parser.parse_args()
    out = options.out or RESULTS / f"equal_flops_{options.dtype}.json"
    wanted = {
        "seq_len": options.seq_len,
        "w0": options.w0,
        "dtype": [options.dtype],
        "is_causal": options.causal,
    }
    rows = []
    for case in CASES:
        if any(values and case[name] not in values for name, values in wanted.items()):
            continue
        row = measure(**case, max_rounds=options.max_rounds, seconds=options.seconds)
        rows.append(row)
        print(
            f"S={case['seq_len']:>6} w0={case['w0']:>4} {case['dtype']:<8} "
            f"{'causal' if case['is_causal'] else 'full  '} | rate over windows: forward "
            f"{row['forward']['ratio_to_windows']:.2f}, forward+backward "
            f"{row['forward_backward']['ratio_to_windows']:.2f} | over square: "
            f"{row['forward']['ratio_to_square']:.2f}, "
            f"{row['forward_backward']['ratio_to_square']:.2f} | forward peak "
            f"{row['forward_peak']['ratio']:.2f} × output",
            flush=True,
        )
        # Written as it grows, so that a long run that is stopped leaves what it measured.
        write_result(out, "equal_flops", rows)


if __name__ == "__main__":
    main()
