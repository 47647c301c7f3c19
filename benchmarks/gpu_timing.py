"""Time calls on a GPU in turn, measure their peak memory, and write results as they come."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from triton.testing import do_bench

ROUNDS = 3

Call = Callable[[], object]


def time_in_turn(
    calls: dict[str, Call], device: torch.device, *, seconds: float
) -> dict[str, dict[str, float]]:
    """Median and quartiles of each call in milliseconds, over rounds in which each has its turn.

    The calls have run before, so that nothing is compiled or loaded here. On a CPU, where the
    kernels are interpreted, each round is one run.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    share_ms = 1e3 * seconds / ROUNDS / max(1, len(calls))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            if device.type == "cuda":
                # Half of the share: before each timed run it clears the cache.
                samples[name] += do_bench(call, 5, share_ms / 2, return_mode="all")
            else:
                begin = time.perf_counter()
                call()
                samples[name].append(1e3 * (time.perf_counter() - begin))
    return {name: _spread(values) for name, values in samples.items()}


def peak_bytes_above(call: Call, device: torch.device) -> int | None:
    """Most memory that a call has allocated at one time beyond what was there; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
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
    """Replace the file in one step, so that a stopped run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(beside, path)


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    names = ("median_ms", "low_ms", "high_ms")
    spread = {name: round(x, 4) for name, x in zip(names, (median, low, high), strict=True)}
    return spread | {"runs": len(values)}
