"""Block-sparse attention beside PyTorch's dense attention, forward and backward.

One thread and CPU seconds, since other work shares the machine: a ratio compares the two in turn in
one process. Each time is the smallest of its rounds. "Efficiency" is the speed-up times the
fraction of blocks kept: 1 would be the rate of the dense kernel. Run
`python benchmarks/block_sparse.py`; `--quick` measures one length.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_sparse import block_sparse_attention, pattern_of_type
from harness import write_result
from torch.nn.functional import scaled_dot_product_attention

NUM_HEADS, HEAD_DIM, BLOCK_SIZE = 2, 64, 64
LENGTHS = [2**n for n in range(12, 17)]
RATIOS = [0.1, 0.02]
KINDS = ("local_window", "dilated_sparse", "global_local", "hierarchical")

# Above this length one dense round takes a minute and more, and what warming up costs is small.
ONE_ROUND_FROM = 2**15


def measure(seq_len: int, is_causal: bool) -> list[dict[str, Any]]:
    """CPU seconds of forward and backward, dense and of each pattern, for one length."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, seq_len, NUM_HEADS, HEAD_DIM).unbind()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def dense() -> torch.Tensor:
        rows = [x.transpose(1, 2) for x in leaves]
        return scaled_dot_product_attention(*rows, is_causal=is_causal).transpose(1, 2)

    def seconds(attend: Callable[[], torch.Tensor], rounds: int) -> tuple[float, float]:
        samples: list[tuple[float, float]] = []
        for _ in range(rounds):
            start = time.process_time()
            out = attend()
            middle = time.process_time()
            torch.autograd.grad(out, leaves, dout)
            samples.append((middle - start, time.process_time() - middle))
        return min(x for x, _ in samples), min(x for _, x in samples)

    dense_s = seconds(dense, 1 if seq_len >= ONE_ROUND_FROM else 3)
    rows: list[dict[str, Any]] = []
    for ratio in RATIOS:
        for kind in KINDS:
            pattern = pattern_of_type(
                kind, seq_len // BLOCK_SIZE, sparsity_ratio=ratio, is_causal=is_causal
            )
            kept = pattern.causal_sparsity_ratio if is_causal else pattern.sparsity_ratio
            sparse_s = seconds(
                lambda p=pattern: block_sparse_attention(*leaves, p, BLOCK_SIZE, is_causal), 4
            )
            row: dict[str, Any] = {
                "seq_len": seq_len,
                "is_causal": is_causal,
                "pattern_type": kind,
                "sparsity_ratio": ratio,
                "kept": kept,
                "num_heads": NUM_HEADS,
                "head_dim": HEAD_DIM,
                "block_size": BLOCK_SIZE,
                "dtype": "float32",
                "threads": torch.get_num_threads(),
            }
            for part, a, b in zip(("forward", "backward"), dense_s, sparse_s, strict=True):
                row[part] = {
                    "dense_cpu_s": a,
                    "sparse_cpu_s": b,
                    "speed_up": a / b,
                    "efficiency": a / b * kept,
                }
            rows.append(row)
            print(
                f"S={seq_len:>6} {'causal' if is_causal else 'full  '} {kind:>14} "
                f"{kept:6.2%} kept | "
                + " | ".join(
                    f"{part} {row[part]['speed_up']:5.1f}x ({row[part]['efficiency']:.2f})"
                    for part in ("forward", "backward")
                ),
                flush=True,
            )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    if "--quick" in sys.argv[1:]:
        measure(2**12, False)
        return
    rows = [row for S in LENGTHS for row in measure(S, False)]
    # Causal dense attention takes half as long; two lengths show how the diagonal changes it.
    rows += [row for S in LENGTHS[2:4] for row in measure(S, True)]
    write_result(Path(__file__).parent / "results" / "block_sparse.json", "block_sparse", rows)


if __name__ == "__main__":
    main()
