"""Block-sparse attention on a GPU: each backend beside PyTorch's dense attention.

All contenders of a row are timed in turn in one process, forward without gradients and
forward+backward. A backend whose result differs from that of `eager` is named and not timed.
`tools/gpu_check.py` runs it; `--device cpu` runs one tiny row in Triton's interpreter, which proves
nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dilated_core.testing import relative_error
from dilated_sparse import BlockPattern, block_sparse_attention, dilated_sparse
from gpu_timing import Call, describe_failure, time_in_turn
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = ("triton", "sdpa")
WRONG = 0.03  # far above the rounding of half precision
ROWS = [(2**n, ratio, c) for n in (14, 16, 17) for ratio in (0.1, 0.02) for c in (False, True)]


def measure(
    seq_len: int,
    sparsity_ratio: float,
    is_causal: bool,
    *,
    device: torch.device,
    num_heads: int = 12,
    head_dim: int = 64,
    block_size: int = 64,
    seconds: float = 4.0,
) -> dict[str, Any]:
    """One row: milliseconds of each contender, or why it was not timed."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    shape = (1, seq_len, num_heads, head_dim)
    q, k, v, dout = torch.randn(4, *shape, device=device, dtype=dtype).unbind()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    pattern = dilated_sparse(
        -(-seq_len // block_size), sparsity_ratio=sparsity_ratio, is_causal=is_causal
    )
    sparse = partial(_sparse, leaves, pattern, block_size, is_causal)
    result: dict[str, Any] = {}
    calls: dict[str, Call] = {"dense": partial(_dense, leaves, is_causal)}
    with torch.no_grad():
        expected = sparse("eager")
        for backend in BACKENDS:
            try:
                error = relative_error(sparse(backend), expected)
            except Exception as failure:  # a compiler fails in many ways
                result[backend] = {"failed": describe_failure(failure, backend, device)}
                continue
            if error > WRONG:
                result[backend] = {"failed": f"differs from eager by {error:.2g}"}
            else:
                calls[backend] = partial(sparse, backend)
    del expected
    both: dict[str, Call] = {
        name: partial(_both, call, leaves, dout) for name, call in calls.items()
    }
    for call in both.values():
        call()  # compiles what the timed calls must not
    with torch.no_grad():
        forward = time_in_turn(calls, device, seconds=seconds / 2)
    forward_backward = time_in_turn(both, device, seconds=seconds / 2)
    for name in calls:
        result[name] = {"forward": forward[name], "forward_backward": forward_backward[name]}
    kept = pattern.causal_sparsity_ratio if is_causal else pattern.sparsity_ratio
    return {
        "seq_len": seq_len,
        "is_causal": is_causal,
        "sparsity_ratio": sparsity_ratio,
        "kept": kept,
        "num_heads": num_heads,
        "head_dim": head_dim,
        "block_size": block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "contenders": result,
    }


def _sparse(
    tensors: list[torch.Tensor],
    pattern: BlockPattern,
    block_size: int,
    is_causal: bool,
    backend: str,
) -> torch.Tensor:
    q, k, v = tensors
    return block_sparse_attention(q, k, v, pattern, block_size, is_causal, backend=backend)


def _dense(tensors: list[torch.Tensor], is_causal: bool) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in tensors)
    return scaled_dot_product_attention(q, k, v, is_causal=is_causal).transpose(1, 2)


def _both(call: Call, leaves: list[torch.Tensor], dout: torch.Tensor) -> object:
    return torch.autograd.grad(call(), leaves, dout)  # pyright: ignore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--quick", action="store_true", help="only 65,536 positions")
    parser.add_argument("--seconds", type=float, default=120, help="start no row after this")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    if device.type == "cpu":
        rows = [measure(40, 0.5, True, device=device, num_heads=1, head_dim=16, block_size=16)]
        options.json.write_text(json.dumps({"rows": rows}) + "\n")
        return
    for seq_len, ratio, is_causal in ROWS:
        if (options.quick and seq_len != 2**16) or time.monotonic() > deadline:
            continue
        rows.append(row := measure(seq_len, ratio, is_causal, device=device))
        print(f"S={seq_len} kept={row['kept']:.2%} causal={is_causal}: {row['contenders']}")
        # Written as it grows, so that a run that is stopped leaves what it measured.
        options.json.write_text(json.dumps({"rows": rows}) + "\n")


if __name__ == "__main__":
    main()
