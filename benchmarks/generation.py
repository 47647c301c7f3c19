"""Time per generated token against the length of the context: `python benchmarks/generation.py`.

A small model continues texts of 1k, 16k and 128k tokens, one step of each in turn, and runs a full
forward over 1k tokens between them: what a token would cost without a cache. Times are those of the
CPU, which other jobs on the machine do not lengthen as they do wall time, on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import torch
from dilated_models import GenerationCache, LongNetConfig, LongNetLM

CONFIG = LongNetConfig(
    num_tokens=256,
    d_model=128,
    nhead=4,
    num_decoder_layers=4,
    dim_feedforward=512,
    segment_lengths=(512, 4096, 32768),
    dilation_rates=(1, 8, 64),
    key_conv=4,
)
CONTEXTS = (2**10, 2**14, 2**17)
# A whole segment of the first branch, so that every fill of its rows counts once.
STEPS = 512
# A full forward costs a hundred steps.
STEPS_PER_FORWARD = 32


@torch.inference_mode()
def measure(contexts: tuple[int, ...] = CONTEXTS, steps: int = STEPS) -> list[dict[str, Any]]:
    """Rows for each context with a cache, and one for the full forward at the shortest."""
    torch.manual_seed(0)
    model = LongNetLM(CONFIG).eval()
    shortest = min(contexts)
    text = torch.randint(256, (1, shortest))
    difference = _check(model, text)
    caches: dict[int, GenerationCache] = {}
    prefill: dict[int, float] = {}
    for context in contexts:
        caches[context] = GenerationCache(model)
        prompt = torch.randint(256, (1, context))
        start = time.process_time()
        model(prompt, cache=caches[context])
        prefill[context] = time.process_time() - start
    samples: dict[int, list[float]] = {context: [] for context in contexts}
    forwards: list[float] = []
    for step in range(steps):
        token = torch.randint(256, (1, 1))
        for context, cache in caches.items():
            start = time.process_time()
            model(token, cache=cache)
            samples[context].append(time.process_time() - start)
        if step % STEPS_PER_FORWARD == 0:
            start = time.process_time()
            model(text)
            forwards.append(time.process_time() - start)
    rows: list[dict[str, Any]] = [
        {
            "context": context,
            "method": "cache",
            "token": _spread(samples[context]),
            "prompt_cpu_s": prefill[context],
            "cache_bytes": caches[context].nbytes,
        }
        for context in contexts
    ]
    full = {"context": shortest, "method": "full forward", "token": _spread(forwards)}
    return [*rows, full | {"largest_difference_of_logits": difference}]


def _check(model: LongNetLM, text: torch.Tensor) -> float:
    """The largest difference of the logits from those of the full forward, in float32.

    Raises:
        ValueError: If it is beyond rounding; nothing is timed then.
    """
    cache = GenerationCache(model)
    half = text.shape[1] // 2
    steps = [model(text[:, :half], cache=cache)]
    steps += [model(text[:, [t]], cache=cache) for t in range(half, text.shape[1])]
    difference = (torch.cat(steps, 1) - model(text)[:, half - 1 :]).abs().max().item()
    if difference > 1e-4:
        raise ValueError(
            f"steps differ from the full forward by {difference}; it must be rounding."
        )
    return difference


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_cpu_s": median, "low_cpu_s": low, "high_cpu_s": high, "rounds": len(values)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = harness.ROOT / "benchmarks" / "results" / "generation.json"
    parser.add_argument("--out", type=Path, default=default)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    for row in rows:
        print(row, flush=True)
    harness.write_result(options.out, "generation", rows)


if __name__ == "__main__":
    main()
