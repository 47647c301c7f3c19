"""What selecting blocks costs beside attention over them, and beside dense attention.

One thread and CPU seconds, in turn in one process, the smallest of the rounds. Causal attention,
forward and backward; selecting has no backward. Run `python benchmarks/adaptive_cost.py`; `--quick`
measures one short length.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_sparse import AdaptiveSparseAttention
from dilated_sparse.adaptive.ops import attend_selected
from harness import write_result
from torch.nn.functional import scaled_dot_product_attention

NUM_HEADS, HEAD_DIM, BLOCK_SIZE, RATIO = 2, 64, 64, 0.1
LENGTHS = [2**14]


def seconds(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measure(seq_len: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of each part for one length."""
    torch.manual_seed(0)
    tensors = torch.randn(4, 1, seq_len, NUM_HEADS, HEAD_DIM).unbind()
    q, k, v = leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    attention = AdaptiveSparseAttention(
        num_heads=NUM_HEADS, head_dim=HEAD_DIM, sparsity_ratio=RATIO, block_size=BLOCK_SIZE
    )
    best: dict[str, float] = {}
    for _ in range(rounds):
        found: dict[str, Any] = {}

        def select(found: dict[str, Any] = found) -> None:
            found["selection"] = attention.select(q, k, is_causal=True)

        def attend(found: dict[str, Any] = found) -> None:
            found["out"] = attend_selected(
                q, k, v, found["selection"],
                block_size=BLOCK_SIZE, is_causal=True, scale=HEAD_DIM**-0.5,
            ).out  # fmt: skip

        def backward(found: dict[str, Any] = found) -> None:
            torch.autograd.grad(found["out"], leaves, tensors[3])

        def dense() -> None:
            rows = (x.transpose(1, 2) for x in tensors[:3])
            scaled_dot_product_attention(*rows, is_causal=True)

        parts = {
            "select": select,
            "forward": attend,
            "backward": backward,
            "dense_forward": dense,
        }
        for name, run in parts.items():
            best[name] = min(best.get(name, float("inf")), seconds(run))
    row = {
        "seq_len": seq_len,
        "cpu_s": best,
        "select_of_forward": best["select"] / (best["select"] + best["forward"]),
        "select_of_forward_and_backward": best["select"]
        / (best["select"] + best["forward"] + best["backward"]),
        "speed_up_of_forward_with_selection": best["dense_forward"]
        / (best["select"] + best["forward"]),
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "sparsity_ratio": RATIO,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }
    print(row, flush=True)
    return row


def main() -> None:
    torch.set_num_threads(1)
    if "--quick" in sys.argv[1:]:
        measure(2**11, 1)
        return
    rows = [measure(seq_len, 4) for seq_len in LENGTHS]
    write_result(Path(__file__).parent / "results" / "adaptive_cost.json", "adaptive_cost", rows)


if __name__ == "__main__":
    main()
