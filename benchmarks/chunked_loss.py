"""Memory of the loss over a vocabulary: whole logits against `linear_cross_entropy`.

`python benchmarks/chunked_loss.py` writes results/chunked_loss.json. Two kinds of rows:

- measured: forward and backward in a process of its own for each way of computing the loss. Peak
  memory above the inputs, CPU time, and whether the loss and the gradient of hidden have the same
  bits.
- counted: the most bytes of tensors that are alive at once, at sizes that this machine cannot hold.
  The same code runs on tensors without values, and each storage is counted while it lives. Measured
  rows have this count too, which shows how far it can be trusted.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dilated_core.cross_entropy as chunks
import torch
from dilated_core import linear_cross_entropy
from harness import (
    high_water_bytes,
    peak_memory_in_fresh_process,
    reset_high_water,
    write_result,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, linear
from torch.utils._python_dispatch import TorchDispatchMode

RESULT = Path(__file__).parent / "results" / "chunked_loss.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MEASURED = ((32_768, 8_192, 256, "float32"), (16_384, 32_768, 256, "float32"))
COUNTED = tuple(
    (262_144, classes, width, dtype)
    for classes, width in ((32_768, 768), (131_072, 4096))
    for dtype in DTYPES
)


def whole(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(linear(hidden, weight).float(), labels)


WAYS: dict[str, Callable[..., torch.Tensor]] = {"whole": whole, "chunked": linear_cross_entropy}


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self._count(x.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._seen:
            return
        self._seen.add(key)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def tensors(
    tokens: int, classes: int, width: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(tokens, width, dtype=DTYPES[dtype])
    weight = torch.randn(classes, width, dtype=DTYPES[dtype]).mul_(width**-0.5)
    labels = torch.randint(classes, (tokens,))
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def counted_bytes(way: str, *size: Any) -> int:
    """The most bytes alive at once above the inputs, of a run on tensors without values."""
    # As for tensors with values: the operator would hide what it allocates. Labels have no values.
    is_plain, chunks.is_plain = chunks.is_plain, lambda *given: len(given) > 1
    try:
        with FakeTensorMode():
            inputs = tensors(*size)
            with AliveBytes() as alive:
                WAYS[way](*inputs).backward()
    finally:
        chunks.is_plain = is_plain
    return alive.peak


def measure(way: str, *size: Any) -> dict[str, Any]:
    """Forward and backward in this process, which must be fresh."""
    torch.set_num_threads(1)
    small = tensors(64, 64, size[2], size[3])
    WAYS[way](*small).backward()  # loads kernels
    torch.manual_seed(0)
    hidden, weight, labels = tensors(*size)
    reset_high_water()
    before, begin = high_water_bytes(), time.process_time()
    loss = WAYS[way](hidden, weight, labels)
    loss.backward()
    seconds = time.process_time() - begin
    return {
        "peak_bytes": high_water_bytes() - before,
        "cpu_s": round(seconds, 2),
        "loss": loss.item(),
        "bits": hashlib.sha256(hidden.grad.view(torch.uint8).numpy()).hexdigest(),
    }


def rows(measured: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for size in (*(MEASURED if measured else ()), *COUNTED):
        row: dict[str, Any] = dict(zip(("tokens", "classes", "width", "dtype"), size, strict=True))
        row |= {"chunk_tokens": chunks.chunk_tokens(size[1])}
        row |= {"counted_bytes": {way: counted_bytes(way, *size) for way in WAYS}}
        row["ratio"] = round(row["counted_bytes"]["whole"] / row["counted_bytes"]["chunked"], 1)
        if size in MEASURED:
            results = {
                way: peak_memory_in_fresh_process("chunked_loss.py", "--way", way, *map(str, size))
                for way in WAYS
            }
            bits = {way: (r.pop("loss"), r.pop("bits")) for way, r in results.items()}
            row |= {
                "measured": results,
                "same_loss_bits": bits["whole"][0] == bits["chunked"][0],
                "same_hidden_gradient_bits": bits["whole"][1] == bits["chunked"][1],
            }
        found.append(row)
        print(json.dumps(row), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--count-only", action="store_true", help="measure nothing, write nothing")
    parser.add_argument("--way", choices=WAYS, help="measure this one here, for the size given")
    parser.add_argument("size", nargs="*", help="tokens, classes, width, dtype")
    options = parser.parse_args()
    if options.way:
        tokens, classes, width, dtype = options.size
        print(json.dumps(measure(options.way, int(tokens), int(classes), int(width), dtype)))
        sys.exit()
    found = rows(not options.count_only)
    if not options.count_only:
        write_result(options.out, "chunked_loss", found)


if __name__ == "__main__":
    main()
