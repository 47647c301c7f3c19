"""What dilated attention costs where it is dense: one branch with r = 1 and w ≥ S.

The peer is PyTorch's `scaled_dot_product_attention` on the same `(B, S, H, D)` tensors, in turn in
one process. Beside the ratio of times stands their difference, which for short sequences is what a
call costs before its kernel starts. Run `python benchmarks/short_sequences.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core import DilatedPattern, dilated_attention
from harness import write_result
from torch.nn.functional import scaled_dot_product_attention

NUM_HEADS, HEAD_DIM, ROUNDS = 8, 64, 15
CASES = [(seq_len, is_causal) for seq_len in (128, 512, 2048) for is_causal in (False, True)]


def measure(seq_len: int, is_causal: bool) -> dict[str, Any]:
    """Times of a call of both, in seconds: inference, forward, forward+backward."""
    torch.manual_seed(0)
    shape = (1, seq_len, NUM_HEADS, HEAD_DIM)
    q, k, v, dout = (torch.randn(shape) for _ in range(4))
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    pattern = DilatedPattern([seq_len], [1])

    def dilated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return dilated_attention(q, k, v, pattern, is_causal=is_causal)

    def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)

    torch.testing.assert_close(dilated(q, k, v), pytorch(q, k, v))
    row: dict[str, Any] = {
        "seq_len": seq_len,
        "is_causal": is_causal,
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
    }
    for part in ("inference", "forward", "forward_backward"):

        def call(attend: Callable[..., torch.Tensor], part: str = part) -> None:
            if part == "inference":
                with torch.no_grad():
                    attend(q, k, v)
            elif part == "forward":
                attend(*leaves)
            else:
                torch.autograd.grad(attend(*leaves), leaves, dout)

        samples = _in_turn([lambda: call(dilated), lambda: call(pytorch)])
        medians = [statistics.median(values) for values in samples]
        row[part] = {
            "dilated_s": medians[0],
            "pytorch_s": medians[1],
            # The machine's speed drifts, so pairs are compared and not medians.
            "ratio": statistics.median(b / a for a, b in zip(*samples, strict=True)),
            "extra_us": 1e6 * statistics.median(a - b for a, b in zip(*samples, strict=True)),
        }
    return row


def _in_turn(calls: list[Callable[[], None]]) -> list[list[float]]:
    """Seconds of a call of each, `ROUNDS` times, each the mean of up to a hundred calls."""
    start = time.perf_counter()
    for call in calls:
        for _ in range(3):
            call()
    repeat = max(1, min(100, round(0.1 / ((time.perf_counter() - start) / 6))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, values in zip(calls, samples, strict=True):
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            values.append((time.perf_counter() - start) / repeat)
    return samples


def main() -> None:
    rows = []
    for seq_len, is_causal in CASES:
        row = measure(seq_len, is_causal)
        rows.append(row)
        print(
            f"S={seq_len:>5} {'causal' if is_causal else 'full  '} | "
            + " | ".join(
                f"{part} {row[part]['ratio']:.3f} ({row[part]['extra_us']:+.0f} us)"
                for part in ("inference", "forward", "forward_backward")
            ),
            flush=True,
        )
    write_result(Path(__file__).parent / "results" / "short_sequences.json", "short", rows)


if __name__ == "__main__":
    main()
