"""Time calls on an accelerator in turn, and measure their peak memory.

Each round runs every call once, back to back as often as it takes to outlast the clock's grain;
what is reported is the median over rounds with its quartiles. On a GPU the clock is a pair of
events on the stream, so the host's own time counts only where it keeps the GPU waiting.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core.atomic_write import write_atomically

MIN_INTERVAL_S = 2e-3
MAX_CALLS_PER_ROUND = 50
CHEAP_S = 0.02

Call = Callable[[int], object]
"""Given a running number, by which a call takes turns between sets of inputs."""


def time_in_rounds(
    calls: dict[str, Call], device: torch.device, *, seconds: float, max_rounds: int = 15
) -> dict[str, dict[str, float]]:
    """Median and quartiles of each call in milliseconds, over three rounds or more.

    The calls have run before, so that nothing is compiled or loaded here.
    """
    if not calls:
        return {}
    repeats = {}
    round_s = 0.0
    for name, call in calls.items():
        call_s = elapsed_s(call, device, 1)
        if call_s < CHEAP_S:
            # A first call may have waited for memory or for another program.
            call_s = min(call_s, *(elapsed_s(call, device, 1) for _ in range(4)))
        repeats[name] = min(MAX_CALLS_PER_ROUND, math.ceil(MIN_INTERVAL_S / max(call_s, 1e-6)))
        round_s += repeats[name] * call_s
    rounds = max(3, min(max_rounds, int(seconds / round_s)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(elapsed_s(call, device, repeats[name]) / repeats[name])
    return {name: _spread(values, repeats[name]) for name, values in samples.items()}


def elapsed_s(call: Call, device: torch.device, repeats: int) -> float:
    """Seconds that `repeats` calls take."""
    if device.type != "cuda":
        start = time.perf_counter()
        for i in range(repeats):
            call(i)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for i in range(repeats):
        call(i)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def peak_bytes_above(call: Call, device: torch.device) -> int | None:
    """Most memory that a call has allocated at one time beyond what was there; None on a CPU."""
    if device.type != "cuda":
        call(0)
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def describe_failure(error: Exception, name: str, device: torch.device) -> str:
    """What went wrong with `name`, in one line.

    Raises:
        RuntimeError: If the device is lost, so that nothing else can run in this process.
    """
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as lost:
            raise RuntimeError(f"{name} lost the device: {line}") from lost
    return line


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace the file in one step, so that whoever is stopped meanwhile leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n")


def _spread(values: list[float], calls_per_round: int) -> dict[str, float]:
    low, median, high = (1e3 * x for x in statistics.quantiles(values, n=4, method="inclusive"))
    return {
        "median_ms": round(median, 4),
        "low_ms": round(low, 4),
        "high_ms": round(high, 4),
        "rounds": len(values),
        "calls_per_round": calls_per_round,
    }
