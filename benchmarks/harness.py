"""Time contenders side by side, measure peak memory in a fresh process, record where it was done.

Machines are noisy, so a result is a ratio of contenders timed in turn in one process: each round
runs every contender once, and what is reported is the median over rounds with its quartiles.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent


class Contender(NamedTuple):
    """Something to time in two parts.

    Attributes:
        forward: Runs the forward pass and returns its result.
        backward: Runs the backward pass from that result.
    """

    forward: Callable[[], torch.Tensor]
    backward: Callable[[torch.Tensor], object]


def time_in_turn(
    contenders: dict[str, Contender], *, max_rounds: int, seconds: float
) -> dict[str, dict[str, dict[str, float]]]:
    """Time all contenders round by round, as many rounds as `seconds` allow but at least three.

    The first round warms up and is not counted, unless it alone takes more than `seconds`: then
    what warming up costs is small beside what is measured.

    Returns:
        For each contender, for "forward" and "forward_backward": median and quartiles in seconds,
        and the number of rounds.
    """
    samples: dict[str, dict[str, list[float]]] = {
        name: {"forward": [], "forward_backward": []} for name in contenders
    }
    begin = time.perf_counter()
    for round_ in range(max_rounds + 1):
        for name, (forward, backward) in contenders.items():
            start = _now()
            out = forward()
            middle = _now()
            backward(out)
            samples[name]["forward"].append(middle - start)
            samples[name]["forward_backward"].append(_now() - start)
        elapsed = time.perf_counter() - begin
        if round_ == 0 and elapsed < seconds:
            for parts in samples.values():
                parts["forward"].clear()
                parts["forward_backward"].clear()
        elif round_ >= 2 and elapsed * (round_ + 2) / (round_ + 1) > seconds:
            break
    return {
        name: {part: _spread(values) for part, values in parts.items()}
        for name, parts in samples.items()
    }


def _spread(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median_s": median, "low_s": low, "high_s": high, "rounds": len(values)}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_in_fresh_process(script: str, *arguments: str) -> dict[str, Any]:
    """Run `script` with this interpreter and read the JSON it prints last."""
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout.strip().splitlines()[-1])


def high_water_bytes() -> int:
    """The most resident memory this process has had since `reset_high_water` or its start."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM; peak memory is measured on Linux.")


def reset_high_water() -> None:
    """Let `high_water_bytes` count from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def environment() -> dict[str, Any]:
    """Machine, versions and commit: what a number means nothing without."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": _cpu_name(),
        "cores": torch.get_num_threads(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dilated-core": version("dilated-core"),
        "commit": _git("rev-parse", "--short", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--", "packages", "benchmarks", ":!benchmarks/results")
        ),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:  # machines that are lent for a measurement may lack it
        return ""
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return run.stdout.strip()


def write_result(path: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Write one benchmark's rows beside the environment they were measured in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"benchmark": name, "environment": environment(), "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
