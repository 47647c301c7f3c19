"""Where the time of a forward pass goes.

For each branch of the patterns of `equal_flops.py`: PyTorch's kernel on the strips (strided views),
the same kernel on contiguous tensors of the same shape, and the merge of the branch into the
result. What a whole call takes beyond their sum is calls, checks and allocation. CPU only, because
it calls the CPU kernel. Run `python benchmarks/breakdown.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core import dilated_attention
from dilated_core.merge import fold_lse_
from dilated_core.strips.plan import Span, plan_problems
from equal_flops import HEAD_DIM, NUM_HEADS, geometric_pattern
from harness import write_result

SEQ_LEN, ROUNDS = 16_384, 7
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def measure(w0: int, is_causal: bool) -> dict[str, Any]:
    """Seconds of each part, medians over rounds in which all parts are timed in turn."""
    torch.manual_seed(0)
    pattern = geometric_pattern(w0)
    shape = (1, SEQ_LEN, NUM_HEADS, HEAD_DIM)
    q, k, v, out = (torch.randn(shape) for _ in range(4))
    lse = torch.randn(shape[:-1])
    parts: dict[str, list[float]] = {"strips": [], "windows": [], "merge": [], "call": []}
    span = Span(0, SEQ_LEN)
    problems = plan_problems(
        pattern,
        queries=span,
        keys=span,
        seq_len=SEQ_LEN,
        num_heads=NUM_HEADS,
        is_causal=is_causal,
        is_batch_dense=True,
    )
    for round_ in range(ROUNDS + 1):
        seconds = dict.fromkeys(parts, 0.0)
        for problem in problems:
            rows = [problem.queries.view(q), problem.keys.view(k), problem.keys.view(v)]
            rows = [x.transpose(1, 2) for x in rows]
            windows = [x.flatten(0, 1).unsqueeze(1).contiguous() for x in rows]
            causal = problem.is_causal
            for part, x in (("strips", rows), ("windows", windows)):
                seconds[part] += _time(lambda x=x, causal=causal: KERNEL(*x, 0.0, causal))
            if not problem.is_first:  # the first covers everything: its result is merged into
                view = problem.queries.view
                partial, partial_lse = (torch.randn_like(view(x)) for x in (out, lse))

                def merge(view=view, partial=partial, partial_lse=partial_lse) -> None:
                    weight = fold_lse_(view(lse), partial_lse).unsqueeze(-1)
                    view(out).lerp_(partial, weight)

                seconds["merge"] += _time(merge)
        seconds["call"] = _time(lambda: dilated_attention(q, k, v, pattern, is_causal=is_causal))
        if round_ > 0:
            for name, value in seconds.items():
                parts[name].append(value)
    medians = {name: statistics.median(values) for name, values in parts.items()}
    return {
        "seq_len": SEQ_LEN,
        "w0": w0,
        "is_causal": is_causal,
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "seconds": medians,
        "share_of_call": {
            "windows": round(medians["windows"] / medians["call"], 3),
            "strides": round((medians["strips"] - medians["windows"]) / medians["call"], 3),
            "merge": round(medians["merge"] / medians["call"], 3),
            "rest": round(1 - (medians["strips"] + medians["merge"]) / medians["call"], 3),
        },
    }


def _time(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    rows = []
    with torch.no_grad():
        for w0 in (128, 512, 2048):
            for is_causal in (False, True):
                row = measure(w0, is_causal)
                rows.append(row)
                shares = ", ".join(f"{k} {v:+.3f}" for k, v in row["share_of_call"].items())
                print(f"w0={w0:>4} {'causal' if is_causal else 'full  '} | {shares}", flush=True)
    write_result(Path(__file__).parent / "results" / "breakdown.json", "breakdown", rows)


if __name__ == "__main__":
    main()
