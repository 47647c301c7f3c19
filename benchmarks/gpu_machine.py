"""What a GPU measurement was made on, and what that machine can do at most.

The ceilings are measured, not read from a datasheet: a large copy in device memory, counting bytes
read and written, and a large bf16 matrix product on random data (zeros run faster).
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from gpu_timing import time_in_turn, write_json
from harness import ROOT, environment

LIBRARIES = ("triton", "einops", "flash-attn", "xformers")


def describe(device: torch.device, commit: str | None) -> dict[str, Any]:
    """Hardware, versions and commit."""
    machine = environment()
    # A copy of the tree without its history has no commit; the command line may name it.
    if not machine["commit"]:
        machine |= {"commit": commit or "", "uncommitted_changes": None}
    machine["device"] = device.type
    own = sorted(path.parent.name for path in ROOT.glob("packages/*/pyproject.toml"))
    for name in (*LIBRARIES, *own):
        try:
            machine[name] = version(name)
        except PackageNotFoundError:
            machine[name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return machine


def ceilings(device: torch.device, *, copy_bytes: int, matrix_size: int) -> dict[str, float]:
    """Rate of a large copy in TB/s and of a large matrix product in TFLOP/s."""
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, matrix_size, matrix_size, device=device, dtype=torch.bfloat16)
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    for call in calls.values():
        call()
    ms = {
        name: spread["median_ms"]
        for name, spread in time_in_turn(calls, device, seconds=2.0).items()
    }
    return {
        "copy_tb_per_s": float(f"{2 * copy_bytes / ms['copy'] / 1e9:.4g}"),
        "bf16_matmul_tflops": float(f"{2 * matrix_size**3 / ms['matmul'] / 1e9:.4g}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--commit", help="recorded where there is no git repository")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        return
    device = torch.device(options.device)
    sizes = (4 * 2**30, 8192) if device.type == "cuda" else (2**20, 64)
    rates = ceilings(device, copy_bytes=sizes[0], matrix_size=sizes[1])
    write_json(options.json, describe(device, options.commit) | {"ceilings": rates})
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}: {rates}")


if __name__ == "__main__":
    main()
