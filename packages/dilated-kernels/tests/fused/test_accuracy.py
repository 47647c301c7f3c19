"""Every backend against float64, on sequences larger than the dense oracle can hold.

- whole: all results of a sequence of 16k against core's eager backend in float64, which the tests
  hold to the oracle;
- drawn: sequences of up to four million positions, more than 2³¹ elements, against the definition
  at randomly drawn positions.

On a CPU, small ones of both kinds.
"""

import gc
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend
from dilated_core.testing import errors_at_drawn_positions, relative_error
from dilated_core.testing.error_budget import pytorch_errors
from dilated_kernels.fused import TritonBackend

NAMES = ("out", "lse", "dq", "dk", "dv")
VENDORS = ("sdpa", "flash2", "flash3", "flash4", "cudnn", "xformers", "efficient", "flex")


class Shape(NamedTuple):
    """One problem; `how` is "whole" or "drawn"."""

    name: str
    how: str
    seq_len: int
    pattern: DilatedPattern
    dtype: torch.dtype = torch.bfloat16
    num_heads: int = 12
    num_kv_heads: int | None = None
    head_dim: int = 64
    is_causal: bool = False


def geometric(w0, count, **options):
    return DilatedPattern(
        [w0 * 2**i for i in range(count)], [2**i for i in range(count)], **options
    )


FIVE, K, M = geometric(2048, 5), 2**10, 2**20
PAPER = DilatedPattern([2048 * 2**i for i in range(5)], [1, 2, 4, 6, 12])
OFFICIAL = replace(PAPER, head_offsets="blocked", padding="attended")
GROUPED = {"num_heads": 16, "num_kv_heads": 4}
WHOLE = [
    Shape("bf16 64", "whole", 16 * K, FIVE),
    Shape("bf16 64 causal", "whole", 16 * K, FIVE, is_causal=True),
    Shape("bf16 128 causal", "whole", 16 * K, FIVE, head_dim=128, is_causal=True),
    Shape("bf16 128", "whole", 16 * K, FIVE, head_dim=128),
    Shape("fp16 64 causal", "whole", 16 * K, FIVE, torch.float16, is_causal=True),
    Shape("fp32 64", "whole", 16 * K, FIVE, torch.float32, 8),
    Shape("paper, grouped", "whole", 16 * K + 37, PAPER, **GROUPED),
    Shape("paper, grouped, causal", "whole", 16 * K + 37, PAPER, **GROUPED, is_causal=True),
    Shape("official", "whole", 16 * K + 37, OFFICIAL),
]
DRAWN = [
    Shape("1M causal", "drawn", M + 5, geometric(2048, 10), is_causal=True),
    # Nine heads are the fewest whose elements a 32-bit offset cannot count.
    Shape("4M", "drawn", 4 * M, geometric(2048, 12), num_heads=9),
    Shape("4M causal", "drawn", 4 * M - 3, geometric(2048, 12), num_heads=9, is_causal=True),
]
SMALL = [
    Shape(
        *("small, grouped, official", "whole", 21),
        DilatedPattern([16, 21], [1, 3], head_offsets="blocked", padding="attended"),
        *(torch.float32, 2, 1, 16),
    ),
    Shape("small, drawn", "drawn", 24, geometric(16, 2), torch.float32, 2, None, 16, True),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN, so that reading it shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()
    torch.cuda.empty_cache()


def inputs_of(shape, device):
    generator = torch.Generator(device).manual_seed(1)
    H, H_kv = shape.num_heads, shape.num_kv_heads or shape.num_heads
    return [
        torch.randn(
            (1, shape.seq_len, heads, shape.head_dim),
            device=device, dtype=shape.dtype, generator=generator,
        ).requires_grad_()
        for heads in (H, H_kv, H_kv, H)
    ]  # fmt: skip


def run(backend, shape, inputs):
    *leaves, dout = inputs
    out, lse = dilated_attention_with_lse(
        *leaves, shape.pattern, is_causal=shape.is_causal, backend=backend
    )
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


@lru_cache(maxsize=1)
def exact_results(shape, device):
    wide = [x.detach().double().requires_grad_() for x in inputs_of(shape, device)]
    return run("eager", shape, wide)


def errors_of(results, shape, inputs):
    if shape.how == "drawn":
        return errors_at_drawn_positions(
            *inputs, results, shape.pattern, is_causal=shape.is_causal, num_positions=24
        )
    errors = {}
    for name, exact in exact_results(shape, inputs[0].device.type).items():
        # A query without keys has lse −∞ in both; the difference would be NaN.
        both_empty = (results[name] == -torch.inf) & (exact == -torch.inf)
        pair = (x.masked_fill(both_empty, 0) for x in (results[name], exact))
        errors[name] = relative_error(*pair)
    return errors


def budget_of(shape, inputs):
    """Twice PyTorch's own errors on the first segment, and one rounding; lse in float32."""
    length = min(shape.seq_len, shape.pattern.segment_lengths[0])
    q, k, v, dout = (x.detach()[:, :length] for x in inputs)
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    errors = pytorch_errors(q, k, v, dout, is_causal=shape.is_causal)
    eps = torch.finfo(shape.dtype).eps
    budget = dict(zip(("out", "dq", "dk", "dv"), (2 * e + eps for e in errors), strict=True))
    # lse is a float32 sum of float32 products of exact inputs, whatever their dtype.
    return budget | {"lse": 2e-5}


def check(backend, shape, device, record_property):
    H, D = shape.num_heads, shape.head_dim
    given = AttentionInputs(torch.device(device), shape.dtype, H, D, seq_len=shape.seq_len)
    try:
        reasons = get_backend(backend).why_not(given)
    except ValueError as error:  # not registered here
        reasons = [str(error)]
    if reasons:
        pytest.skip(" ".join(reasons))
    inputs = inputs_of(shape, device)
    results = run(backend, shape, inputs)
    errors, budget = errors_of(results, shape, inputs), budget_of(shape, inputs)
    record_property("errors", {name: float(f"{error:.3g}") for name, error in errors.items()})
    assert {"out", "lse", "dq"} <= errors.keys()
    # Written so that NaN fails.
    assert not {n: (e, budget[n]) for n, e in errors.items() if not e <= budget[n]}
    return results, inputs


def check_fused(shape, device, record_property):
    """The same bits twice: an error that moves is a race."""
    results, inputs = check("triton", shape, device, record_property)
    again = run("triton", shape, inputs)
    assert [name for name in NAMES if not torch.equal(results[name], again[name])] == []


def by_name(shape):
    return shape.name


@pytest.mark.parametrize("shape", SMALL, ids=by_name)
@pytest.mark.parametrize("backend", ["triton", "sdpa"])
def test_small_sequences(backend, shape, record_property):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check(backend, shape, device, record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", WHOLE, ids=by_name)
def test_fused_kernels_on_whole_sequences(shape, record_property):
    check_fused(shape, "cuda", record_property)


@pytest.mark.gpu
def test_orders_of_tiles_give_the_same_bits_on_whole_sequences():
    register_backend(TritonBackend(tile_order="hilbert", name="triton-test"))
    try:
        inputs = inputs_of(WHOLE[0], "cuda")
        results = [run(name, WHOLE[0], inputs) for name in ("triton", "triton-test")]
    finally:
        unregister_backend("triton-test")
    assert all(torch.equal(results[0][name], results[1][name]) for name in NAMES)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.parametrize("shape", DRAWN, ids=by_name)
def test_fused_kernels_at_drawn_positions(shape, record_property):
    check_fused(shape, "cuda", record_property)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*WHOLE[:2], *WHOLE[4:7]], ids=by_name)
@pytest.mark.parametrize("backend", VENDORS)
def test_other_backends_on_whole_sequences(backend, shape, record_property):
    check(backend, shape, "cuda", record_property)
