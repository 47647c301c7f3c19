"""What a GPU measurement was made on, and what that machine can do at most.

The ceilings are measured, not read from a datasheet: a large copy in device memory, counting bytes
read and written, and a large bf16 matrix product on random data (zeros run faster).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_timing import time_in_rounds, write_json
from harness import environment

LIBRARIES = ("triton", "einops", "numpy", "pytest", "hypothesis", "flash-attn", "xformers")


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Hardware, driver, versions and commit."""
    machine = environment()
    # A copy of the tree without its history cannot say which commit it is; who copied it can.
    if not machine["commit"]:
        machine |= {"commit": commit or "", "uncommitted_changes": None}
    machine["device"] = device.type
    for name in (*LIBRARIES, *_own_packages()):
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        major, minor = torch.cuda.get_device_capability(device)
        machine |= {
            "capability": f"{major}.{minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return machine


def ceilings(device: torch.device, *, copy_bytes: int, matrix_size: int) -> dict[str, float]:
    """Rate of a large copy in TB/s and of a large matrix product in TFLOP/s."""
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = (
        torch.randn(matrix_size, matrix_size, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    calls = {"copy": lambda _: target.copy_(source), "matmul": lambda _: a @ b}
    for call in calls.values():
        for i in range(3):
            call(i)
    ms = time_in_rounds(calls, device, seconds=2.0)
    return {
        "copy_tb_per_s": round(2 * copy_bytes / ms["copy"]["median_ms"] / 1e9, 4),
        "bf16_matmul_tflops": round(2 * matrix_size**3 / ms["matmul"]["median_ms"] / 1e9, 4),
    }


def _own_packages() -> list[str]:
    packages = Path(__file__).resolve().parent.parent / "packages"
    return sorted(path.parent.name for path in packages.glob("*/pyproject.toml"))


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    run = subprocess.run(query, capture_output=True, text=True)
    return run.stdout.split("\n")[0].strip() or None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--commit", help="what to record if there is no git repository to ask")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        write_json(options.json, {"environment": None, "complete": True})
        return
    device = torch.device(options.device)
    result: dict[str, Any] = {"environment": describe(device, options.commit)}
    write_json(options.json, result)
    sizes = (4 * 2**30, 8192) if device.type == "cuda" else (2**20, 64)
    result["environment"]["ceilings"] = ceilings(device, copy_bytes=sizes[0], matrix_size=sizes[1])
    write_json(options.json, {**result, "complete": True})
    print(f"{result['environment']['gpu'] or 'CPU'}: {result['environment']['ceilings']}")


if __name__ == "__main__":
    main()
