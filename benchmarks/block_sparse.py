"""Block-sparse attention beside PyTorch's dense attention: speed, softmax mass kept, memory.

One thread and CPU seconds, since other work may share the machine: a ratio compares the two in one
process, and each time is the smallest of its rounds. Long dense rounds run once and with one head.
"Efficiency" is the speed-up times the fraction of blocks kept: 1 would be the rate of the dense
kernel. The inputs have topics: the 64 positions of a block share one of 64 directions, so softmax
mass gathers in few blocks, as it does in trained models. Run `python benchmarks/block_sparse.py`;
`--quick` measures one length, and `--adaptive` attention that chooses its blocks, which takes a
minute and has a result of its own.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core import DilatedPattern, dilated_attention_with_lse
from dilated_sparse import (
    AdaptiveSparseAttention,
    BlockPattern,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    pattern_of_type,
)
from harness import (
    high_water_bytes,
    peak_memory_in_fresh_process,
    reset_high_water,
    write_result,
)
from torch.nn.functional import scaled_dot_product_attention

HEAD_DIM, BLOCK_SIZE, TOPICS = 64, 64, 64
LENGTHS = [2**n for n in range(9, 17)]
RATIOS = [0.1, 0.02]
KINDS = ("local_window", "dilated_sparse", "global_local", "hierarchical")
CAUSAL_LENGTHS = (2**13, 2**14)
ADAPTIVE_LENGTHS = (2**12, 2**14)
PEAK_LENGTHS = (2**14, 2**16)

ROUNDS = 6

# From this length on a dense round takes a minute and more: one round of one head, of fewer kinds.
ONE_ROUND_FROM = 2**15


def num_heads(seq_len: int) -> int:
    """Heads that are measured at a length."""
    return 1 if seq_len >= ONE_ROUND_FROM else 2


def inputs(seq_len: int) -> list[torch.Tensor]:
    """q, k, v and dout `(1, S, H, D)`."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, seq_len, num_heads(seq_len), HEAD_DIM)
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    topics = torch.randn(TOPICS, HEAD_DIM, generator=generator)
    chosen = torch.randint(TOPICS, (-(-seq_len // BLOCK_SIZE),), generator=generator)
    direction = topics[chosen].repeat_interleave(BLOCK_SIZE, 0)[:seq_len, None]
    return [q + direction, k + direction, v, dout]


def measure(seq_len: int, is_causal: bool) -> list[dict[str, Any]]:
    """CPU seconds of forward and backward, dense and of each pattern, for one length."""
    q, k, v, dout = inputs(seq_len)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    is_long = seq_len >= ONE_ROUND_FROM

    def dense() -> torch.Tensor:
        rows = [x.transpose(1, 2) for x in leaves]
        return scaled_dot_product_attention(*rows, is_causal=is_causal).transpose(1, 2)

    dense_s = _seconds(dense, leaves, dout, 1 if is_long else ROUNDS)
    lse = None if is_long else _dense_lse(leaves, is_causal)
    rows: list[dict[str, Any]] = []
    for ratio in RATIOS:
        for kind in KINDS[:2] if is_long else KINDS:
            pattern = pattern_of_type(
                kind, seq_len // BLOCK_SIZE, sparsity_ratio=ratio, is_causal=is_causal
            )
            kept = pattern.causal_sparsity_ratio if is_causal else pattern.sparsity_ratio
            sparse_s = _seconds(
                lambda p=pattern: block_sparse_attention(*leaves, p, BLOCK_SIZE, is_causal),
                *(leaves, dout, 2 if is_long else ROUNDS),
            )
            row = _row("speed", seq_len, is_causal) | {
                "pattern_type": kind,
                "sparsity_ratio": ratio,
                "kept": kept,
                "mass": None if lse is None else _mass(leaves, pattern, lse, is_causal),
            }
            for part, a, b in zip(("forward", "backward"), dense_s, sparse_s, strict=True):
                row[part] = {
                    "dense_cpu_s": a,
                    "sparse_cpu_s": b,
                    "speed_up": a / b,
                    "efficiency": a / b * kept,
                }
            rows.append(row)
            _show(row)
    return rows


def measure_adaptive(seq_len: int) -> dict[str, Any]:
    """Speed-up, mass kept and the selector's share of forward, of 10 % chosen by content."""
    q, k, v, dout = inputs(seq_len)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    heads = num_heads(seq_len)
    attention = AdaptiveSparseAttention(
        num_heads=heads, head_dim=HEAD_DIM, sparsity_ratio=0.1, distillation="none"
    )

    def dense() -> torch.Tensor:
        rows = [x.transpose(1, 2) for x in leaves]
        return scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2)

    dense_s = _seconds(dense, leaves, dout, ROUNDS)
    sparse_s = _seconds(lambda: attention(*leaves, is_causal=True), leaves, dout, ROUNDS)
    selector: list[float] = []
    with torch.no_grad():
        for _ in range(ROUNDS):
            start = time.process_time()
            selection = attention.select(q, k, is_causal=True)
            selector.append(time.process_time() - start)
    pattern = selection.pattern(0)
    row = _row("adaptive", seq_len, True) | {
        "sparsity_ratio": 0.1,
        "kept": pattern.causal_sparsity_ratio,
        "mass": _mass(leaves, pattern, _dense_lse(leaves, True), True),
        "selector_share_of_forward": min(selector) / sparse_s[0],
        "forward": {"dense_cpu_s": dense_s[0], "sparse_cpu_s": sparse_s[0]},
        "backward": {"dense_cpu_s": dense_s[1], "sparse_cpu_s": sparse_s[1]},
    }
    print(row, flush=True)
    return row


def peak(seq_len: int, name: str) -> int:
    """Bytes that one forward takes beyond its inputs; in a process of its own."""
    q, k, v, _ = inputs(seq_len)
    tiny = [x[:, :256] for x in (q, k, v)]

    def attend(x: list[torch.Tensor]) -> torch.Tensor:
        if name == "dense":
            return scaled_dot_product_attention(*(y.transpose(1, 2) for y in x))
        pattern = pattern_of_type("dilated_sparse", x[0].shape[1] // BLOCK_SIZE, sparsity_ratio=0.1)
        return block_sparse_attention(*x, pattern, BLOCK_SIZE)

    with torch.no_grad():
        attend(tiny)  # loads kernels, whose memory is not the attention's
        reset_high_water()
        before = high_water_bytes()
        attend([q, k, v])
        return high_water_bytes() - before


def _seconds(
    attend: Callable[[], torch.Tensor], leaves: list[torch.Tensor], dout: torch.Tensor, rounds: int
) -> tuple[float, float]:
    """The least CPU seconds of forward, and of backward."""
    samples: list[tuple[float, float]] = []
    for _ in range(rounds):
        start = time.process_time()
        out = attend()
        middle = time.process_time()
        torch.autograd.grad(out, leaves, dout)
        samples.append((middle - start, time.process_time() - middle))
    return min(x for x, _ in samples), min(x for _, x in samples)


@torch.no_grad()
def _dense_lse(leaves: list[torch.Tensor], is_causal: bool) -> torch.Tensor:
    q, k, v = leaves
    pattern = DilatedPattern([q.shape[1]], [1])
    return dilated_attention_with_lse(q, k, v, pattern, is_causal=is_causal).lse


@torch.no_grad()
def _mass(
    leaves: list[torch.Tensor], pattern: BlockPattern, lse: torch.Tensor, is_causal: bool
) -> float:
    """Share of the softmax mass of dense attention in the kept blocks, mean over queries."""
    q, k, v = leaves
    kept = block_sparse_attention_with_lse(q, k, v, pattern, BLOCK_SIZE, is_causal).lse
    return round(float((kept - lse).exp().mean()), 4)


def _row(part: str, seq_len: int, is_causal: bool) -> dict[str, Any]:
    return {
        "part": part,
        "seq_len": seq_len,
        "is_causal": is_causal,
        "num_heads": num_heads(seq_len),
        "head_dim": HEAD_DIM,
        "block_size": BLOCK_SIZE,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
    }


def _show(row: dict[str, Any]) -> None:
    print(
        f"S={row['seq_len']:>6} {'causal' if row['is_causal'] else 'full  '} "
        f"{row['pattern_type']:>14} {row['kept']:6.2%} kept, mass {row['mass']} | "
        + " | ".join(
            f"{part} {row[part]['speed_up']:5.1f}x ({row[part]['efficiency']:.2f})"
            for part in ("forward", "backward")
        ),
        flush=True,
    )


def main() -> None:
    """Measure everything and record it."""
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--peak"]:
        print(json.dumps({"bytes_above_inputs": peak(int(sys.argv[2]), sys.argv[3])}))
        return
    results = Path(__file__).parent / "results"
    if "--adaptive" in sys.argv[1:]:
        rows = [measure_adaptive(S) for S in ADAPTIVE_LENGTHS]
        write_result(results / "adaptive_speed.json", "adaptive_speed", rows)
        return
    if "--quick" in sys.argv[1:]:
        measure(2**12, False)
        return
    rows = [row for S in LENGTHS for row in measure(S, False)]
    # Causal dense attention takes half as long; two lengths show how the diagonal changes it.
    rows += [row for S in CAUSAL_LENGTHS for row in measure(S, True)]
    for S in PEAK_LENGTHS:
        for name in ("dense", "sparse"):
            found = peak_memory_in_fresh_process("block_sparse.py", "--peak", str(S), name)
            rows.append(_row("memory", S, False) | {"attention": name, **found})
            print(rows[-1], flush=True)
    write_result(results / "block_sparse.json", "block_sparse", rows)


if __name__ == "__main__":
    main()
