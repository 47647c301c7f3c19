"""Every backend on a GPU against float64, on shapes larger than the tests can afford.

- whole: all results of a sequence of 16k against core's eager backend in float64, which the tests
  hold to the oracle;
- drawn: sequences of up to four million positions, more than 2³¹ elements, against the definition
  at randomly drawn positions (gpu_oracle.py).

Errors may be twice those of PyTorch's own attention in the same dtype. The fused kernels must also
give the same bits twice and in either order of tiles: an error that moves is a race. Uninitialised
memory is filled with NaN.

Run `python benchmarks/gpu_accuracy.py --json FILE`; --tiny is for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import gc
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern, available_backends, dilated_attention_with_lse
from dilated_core.testing.error_budget import pytorch_errors, relative_error
from gpu_contenders import FUSED, HILBERT, register_tile_orders, runnable_backends
from gpu_oracle import Call, sampled_errors
from gpu_timing import describe_failure, write_json

NAMES = ("out", "lse", "dq", "dk", "dv")
Results = dict[str, torch.Tensor]


class Case(NamedTuple):
    """One shape in one dtype; `how` is "whole" or "drawn".

    `without` names backends that are left out: flex and the other tile order take long to compile,
    and the longest sequences are there for the 64-bit offsets of the fused kernels.
    """

    name: str
    how: str
    seq_len: int
    pattern: DilatedPattern
    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int = 64
    is_causal: bool = False
    without: tuple[str, ...] = ("flex", HILBERT)


def geometric(w0: int, count: int, **options: Any) -> DilatedPattern:
    return DilatedPattern(
        [w0 * 2**i for i in range(count)], [2**i for i in range(count)], **options
    )


def gpu_cases() -> list[Case]:
    """The whole sequences, and after them the drawn ones, which need most of the memory.

    Every combination of dtype, head_dim and options is compiled anew, so each is there once.
    """
    five, many, K = geometric(2048, 5), geometric(2048, 10), 2**10
    rates = [1, 2, 4, 6, 12]
    paper = DilatedPattern([2048 * 2**i for i in range(5)], rates)
    official = replace(paper, head_offsets="blocked", padding="attended")
    grouped = {"num_heads": 16, "num_kv_heads": 4}
    all_but_fused = tuple(name for name in available_backends() if name != FUSED)
    return [
        Case("bf16 64", "whole", 16 * K, five, without=()),
        Case("bf16 64 causal", "whole", 16 * K, five, is_causal=True, without=("flex",)),
        Case("bf16 128 causal", "whole", 16 * K, five, head_dim=128, is_causal=True),
        Case("bf16 128", "whole", 16 * K, five, head_dim=128),
        Case("fp16 64 causal", "whole", 16 * K, five, torch.float16, is_causal=True),
        Case("fp32 64", "whole", 16 * K, five, torch.float32, 8),
        Case("paper, grouped", "whole", 16 * K + 37, paper, **grouped),
        Case("paper, grouped, causal", "whole", 16 * K + 37, paper, **grouped, is_causal=True),
        Case("official", "whole", 16 * K + 37, official),
        Case("1M causal", "drawn", 2**20 + 5, many, is_causal=True),
        # Nine heads are the fewest whose elements a 32-bit offset cannot count.
        Case("4M", "drawn", 2**22, geometric(2048, 12), num_heads=9, without=all_but_fused),
        Case(
            "4M causal", "drawn", 2**22 - 3, many,
            num_heads=9, is_causal=True, without=all_but_fused,
        ),
    ]  # fmt: skip


def small_cases(dtype: torch.dtype) -> list[Case]:
    """A few small ones that use most of the kernels' code."""
    grouped = DilatedPattern([16, 21], [1, 3], head_offsets="blocked", padding="attended")
    without = ("flex",)
    cases = [
        Case("grouped, attended", "whole", 21, grouped, dtype, 2, 1, 16, without=without),
        Case(
            "causal", "drawn", 24, geometric(16, 2), dtype, 2, None, 16,
            is_causal=True, without=without,
        ),
    ]  # fmt: skip
    if dtype == torch.bfloat16:  # on a GPU: tiles and pipelines as on real shapes
        cases.append(Case("64", "drawn", 300, geometric(64, 3), dtype, 4, without=without))
    return cases


def my_share(cases: list[Case], share: str) -> list[Case]:
    """Of N processes, the first takes the drawn cases and the others share the whole ones."""
    index, count = map(int, share.split("/"))
    if count == 1:
        return cases
    if index == 0:
        return [case for case in cases if case.how == "drawn"]
    return [case for case in cases if case.how == "whole"][index - 1 :: count - 1]


def run_backend(name: str, case: Case, inputs: list[torch.Tensor]) -> Results:
    """out, lse, dq, dk, dv of a backend."""
    *leaves, dout = inputs
    out, lse = dilated_attention_with_lse(
        *leaves, case.pattern, is_causal=case.is_causal, backend=name
    )
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def check(case: Case, device: torch.device) -> list[dict[str, Any]]:
    """One row per backend, with the errors, what is allowed, and what is wrong."""
    H, D = case.num_heads, case.head_dim
    generator = torch.Generator(device).manual_seed(1)

    def random(heads: int, requires_grad: bool) -> torch.Tensor:
        x = torch.randn(
            (1, case.seq_len, heads, D), device=device, dtype=case.dtype, generator=generator
        )
        return x.requires_grad_(requires_grad)

    K = case.num_kv_heads or H
    inputs = [random(H, True), random(K, True), random(K, True), random(H, False)]
    budget = _budget(case, inputs)
    exact = None
    if case.how == "whole":
        wide = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        exact = run_backend("eager", case, wide)
    names, _ = runnable_backends(device, case.dtype, case.seq_len, H, D)
    names = [name for name in names if name not in case.without]
    rows = []
    for name in names:
        row: dict[str, Any] = {"case": case.name, "backend": name}
        try:
            row |= _judge(name, case, inputs, exact, budget)
        except torch.OutOfMemoryError:
            row |= {"not_checked": "out of memory"}
        except Exception as error:  # a compiler fails in many ways; no other row must suffer
            row |= {"problems": [describe_failure(error, name, device)]}
        rows.append(row)
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return rows


def _judge(
    name: str,
    case: Case,
    inputs: list[torch.Tensor],
    exact: Results | None,
    budget: dict[str, float],
) -> dict[str, Any]:
    results = run_backend(name, case, inputs)
    if exact is None:
        call = Call(*inputs, *(results[key] for key in NAMES))
        errors = sampled_errors(call, case.pattern, is_causal=case.is_causal, num_positions=24)
    else:
        errors = {}
        for key in NAMES:
            # A query without keys has lse −inf in both; the difference would be NaN.
            both_empty = (results[key] == -torch.inf) & (exact[key] == -torch.inf)
            pair = (x[key].masked_fill(both_empty, 0) for x in (results, exact))
            errors[key] = relative_error(*pair)
    problems = [
        f"{key}: relative error {error:.2e}, allowed {budget[key]:.2e}"
        for key, error in errors.items()
        if not error <= budget[key]
    ]
    if name == FUSED:
        again = run_backend(name, case, inputs)
        problems += [f"{key} differs when run twice" for key in _different(results, again)]
    if name == HILBERT:
        problems += [
            f"{key} differs between tile orders"
            for key in _different(results, run_backend(FUSED, case, inputs))
        ]
    return {
        "errors": {key: float(f"{error:.3g}") for key, error in errors.items()},
        "allowed": {key: float(f"{budget[key]:.3g}") for key in errors},
        "problems": problems,
    }


def _different(a: Results, b: Results) -> list[str]:
    return [key for key in NAMES if not torch.equal(a[key], b[key])]


def _budget(case: Case, inputs: list[torch.Tensor]) -> dict[str, float]:
    """Twice PyTorch's own errors on the first segment, and one rounding; lse in float32."""
    length = min(case.seq_len, case.pattern.segment_lengths[0])
    q, k, v, dout = (x.detach()[:, :length] for x in inputs)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    errors = pytorch_errors(q, k, v, dout, is_causal=case.is_causal)
    eps = torch.finfo(case.dtype).eps
    budget = dict(zip(("out", "dq", "dk", "dv"), (2 * e + eps for e in errors), strict=True))
    # lse is a float32 sum of float32 products of exact inputs, whatever their dtype; its relative
    # error is that of scores, which tf32 and bf16 units still add up in float32.
    return budget | {"lse": 2e-5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, required=True, help="file for the result")
    parser.add_argument("--quick", action="store_true", help="only bf16, and no sequence above 16k")
    parser.add_argument("--tiny", action="store_true", help="only small shapes")
    parser.add_argument("--share", default="0/1", help="I/N: the I-th part of N")
    options = parser.parse_args()
    register_tile_orders()
    device = torch.device(options.device)
    if device.type == "cpu" or options.tiny:
        cases = small_cases(torch.float32 if device.type == "cpu" else torch.bfloat16)
    else:
        cases = [case for case in gpu_cases() if not options.quick or "bf16" in case.name]
    cases = my_share(cases, options.share)
    warnings.simplefilter("ignore")  # some of PyTorch's operators are not deterministic, and say so
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    result: dict[str, Any] = {"rows": [], "cases": len(cases)}
    for case in cases:
        for row in check(case, device):
            result["rows"].append(row)
            verdict = row.get("not_checked") or "; ".join(row["problems"]) or "ok"
            print(f"{case.name:<28} {row['backend']:<15} {verdict}", flush=True)
        write_json(options.json, result)
    write_json(options.json, {**result, "complete": True})


if __name__ == "__main__":
    main()
