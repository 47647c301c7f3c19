"""Figure 5: time of a forward pass against length at a fixed total number of tokens.

The batch shrinks as the length grows, so dilated attention does the same work at every length and
dense attention work that grows with the length. CPU time on one thread. Dense attention is measured
as far as a pass takes one minute; behind that its time grows with the length.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from dilated_core import DilatedPattern, dilated_attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from longnet_paper.sizes import Size

NUM_HEADS, HEAD_DIM = 2, 64
SHORTEST, ROUNDS = 512, 5
LONGEST_DENSE_S = 60.0


def total_tokens(size: Size) -> int:
    """2¹⁵ tokens at scale 1; the paper has a billion."""
    return size.scale << 15


def lengths(size: Size) -> list[int]:
    """512, 2,048 … and last, one sequence of all tokens."""
    total = total_tokens(size)
    return [*(s for s in (SHORTEST << 2 * i for i in range(20)) if s < total), total]


def calls(seq_len: int, pattern: DilatedPattern, size: Size) -> dict[str, Callable[[], Tensor]]:
    """Causal forward passes over all tokens, in sequences of S; each in its own layout."""
    torch.manual_seed(0)
    batch = total_tokens(size) // seq_len
    dilated = [torch.randn(batch, seq_len, NUM_HEADS, HEAD_DIM) for _ in range(3)]
    dense = [x.transpose(1, 2).contiguous() for x in dilated]
    return {
        "dilated": lambda: dilated_attention(*dilated, pattern, is_causal=True),
        "dense": lambda: scaled_dot_product_attention(*dense, is_causal=True),
    }


@torch.no_grad()
def measure_all(size: Size) -> list[dict[str, Any]]:
    """A row for each length; contenders run in turn."""
    torch.set_num_threads(1)
    pattern = size.pattern(size.long[-1])
    rows: list[dict[str, Any]] = []
    dense_s = 0.0
    for seq_len in lengths(size):
        expected = dense_s * seq_len / rows[-1]["seq_len"] if rows else 0.0
        ready = calls(seq_len, pattern, size)
        skipped = expected > LONGEST_DENSE_S
        if skipped:
            del ready["dense"]
        times: dict[str, list[float]] = {name: [] for name in ready}
        # A dense pass of 20 s needs no warming up, and no third run.
        rounds = ROUNDS + 1 if expected < LONGEST_DENSE_S / 4 else 2
        for round_ in range(rounds):
            for name, call in ready.items():
                began = time.process_time()
                call()
                if round_:
                    times[name].append(time.process_time() - began)
        row = {
            "seq_len": seq_len,
            "batch_size": total_tokens(size) // seq_len,
            "num_heads": NUM_HEADS,
            "head_dim": HEAD_DIM,
            "dtype": "float32",
            "segment_lengths": list(pattern.segment_lengths),
            "dilation_rates": list(pattern.dilation_rates),
            "scale": size.scale,
        }
        for name, values in times.items():
            row[name] = {"cpu_s": sorted(values), "best_cpu_s": min(values), "extrapolated": False}
        if skipped:
            row["dense"] = {"cpu_s": [], "best_cpu_s": expected, "extrapolated": True}
        dense_s = row["dense"]["best_cpu_s"]
        rows.append(row)
        print(f"{seq_len:>8}: " + str({n: row[n]["best_cpu_s"] for n in ("dilated", "dense")}))
    return rows
