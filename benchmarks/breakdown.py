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
from dilated_core.strips.plan import plan_strips
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
    strips = plan_strips(pattern, 1, SEQ_LEN, NUM_HEADS)
    for round_ in range(ROUNDS + 1):
        seconds = dict.fromkeys(parts, 0.0)
        for i, strip in enumerate(strips):
            rows = [strip.view(x).transpose(1, 2) for x in (q, k, v)]
            windows = [x.flatten(0, 1).unsqueeze(1).contiguous() for x in rows]
            seconds["strips"] += _time(lambda rows=rows: KERNEL(*rows, 0.0, is_causal))
            seconds["windows"] += _time(lambda rows=windows: KERNEL(*rows, 0.0, is_causal))
            if i > 0:  # the first strip covers everything: its result is merged into
                partial, partial_lse = (torch.randn_like(strip.view(x)) for x in (out, lse))

                def merge(strip=strip, partial=partial, partial_lse=partial_lse) -> None:
                    weight = fold_lse_(strip.view(lse), partial_lse).unsqueeze(-1)
                    strip.view(out).lerp_(partial, weight)

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
