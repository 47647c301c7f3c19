"""Calls that break careless kernels: huge numbers, empty documents, threads, devices, strides.

NaN in masked rows and strides of inputs and gradients are part of core's conformance suite.
"""

import os
import subprocess
import sys

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention_with_lse,
)
from dilated_core.backends.contract import AttentionOptions
from dilated_core.backends.registry import get_backend
from dilated_core.testing import assert_within_budget, relative_error
from dilated_core.testing.error_budget import pytorch_errors, term_sizes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "lse", "dq", "dk", "dv")


def random(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def results(attend, q, k, v, pattern, **options):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*leaves, pattern, **options)
    upstream = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_like_the_oracle(q, k, v, pattern, **options):
    got = results(dilated_attention_with_lse, q, k, v, pattern, backend="triton", **options)
    want = results(reference_dilated_attention_with_lse, q, k, v, pattern, **options)
    for name, a, e in zip(NAMES, got, want, strict=True):
        empty = e == -torch.inf
        assert torch.equal(a == -torch.inf, empty), name
        assert relative_error(a.masked_fill(empty, 0), e.masked_fill(empty, 0)) < 5e-6, name


HUGE = DilatedPattern([8, 2**63, 2**70, 20], [1, 3, 2**64, 2**63 - 1])


def test_segments_and_rates_beyond_64_bits():
    q, k, v = random(*[(1, 20, 3, 8)] * 3)
    assert_like_the_oracle(q, k, v, HUGE, is_causal=True)


@pytest.mark.parametrize("bounds", [[0, 3, 3, 10], [0, 0, 10, 10], [0, 0]])
@pytest.mark.parametrize("pattern", [HUGE, DilatedPattern([4, 8], [1, 2], padding="attended")])
def test_empty_documents(bounds, pattern):
    q, k, v = random(*[(bounds[-1], 2, 8)] * 3)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    assert_like_the_oracle(q, k, v, pattern, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8)])
def test_empty_tensors(shape):
    q, k, v = random(*[shape] * 3)
    found = results(dilated_attention_with_lse, q, k, v, DilatedPattern([4], [1]), backend="triton")
    assert [x.shape for x in found] == [shape, shape[:3], *[shape] * 3]


def test_a_default_device_changes_nothing():
    """Tables of documents and orders of tiles are made on the device of the data."""
    q, k, v = random(*[(10, 2, 8)] * 3)
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32, device=DEVICE)
    pattern = DilatedPattern([4, 8], [1, 2])
    options = {"cu_seqlens": cu_seqlens, "backend": "triton"}
    want = dilated_attention(q, k, v, pattern, **options)
    with torch.device("meta"):
        got = dilated_attention(q, k, v, pattern, **options)
    assert torch.equal(got, want)


def test_backward_takes_what_the_contract_allows():
    """Tensors of any strides, an lse wider than float32, and a delta that it may ignore."""
    q, k, v, dout = random(*[(2, 9, 2, 8)] * 4)
    backend, options = get_backend("triton"), AttentionOptions(is_causal=True, scale=0.3)
    out, lse = backend.forward(q, k, v, options)
    want = backend.backward(dout, q, k, v, out, lse, options)

    def reversed_strides(x):
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))

    for change in (reversed_strides, lambda x: torch.stack([x, -x], -1)[..., 0]):
        tensors = [change(x) for x in (dout, q, k, v, out, lse)]
        assert all(map(torch.equal, backend.backward(*tensors, options), want))
    got = backend.backward(dout, q, k, v, out, lse.double(), options, delta=(dout * out).sum(-1))
    assert all(map(torch.equal, got, want))


def test_other_rows_of_k_than_of_q_are_refused():
    backend, options = get_backend("triton"), AttentionOptions(is_causal=False, scale=0.3)
    q, k = random((1, 4, 2, 8), (1, 6, 2, 8))
    with pytest.raises(ValueError, match="q has 4 rows and k 6; the kernels of backend 'triton'"):
        backend.forward(q, k, k, options)
    with pytest.raises(ValueError, match="q has 4 rows and k 6; the kernels of backend 'triton'"):
        backend.backward(q, q, k, k, q, q[..., 0], options)


# Backward computes the probability of keys that a query must not see, which may overflow, and then
# replaces it by 0; NumPy, which the interpreter runs on, warns of that.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("magnitude", [1e2, 1e4])
@pytest.mark.parametrize(("lengths", "rates"), [([48], [1]), ([16, 48], [1, 3])], ids=str)
def test_large_scores_are_within_the_budget(lengths, rates, magnitude):
    """As docs/numerics.md states: with several branches, all but dv."""
    pattern = DilatedPattern(lengths, rates)
    q, k, v, dout = random(*[(2, 48, 3, 16)] * 4)
    q, k = q * magnitude**0.5, k * magnitude**0.5
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, pattern, is_causal=True, backend="triton")
    exact, _ = reference_dilated_attention_with_lse(*leaves, pattern, is_causal=True)
    sizes = term_sizes(*leaves, dout, pattern, is_causal=True)
    budget = pytorch_errors(*leaves, dout, is_causal=True, pattern=pattern, sizes=sizes)
    if len(lengths) > 1:
        budget[3] = torch.inf
    assert_within_budget(
        [out, *torch.autograd.grad(out, leaves, dout)],
        [exact, *torch.autograd.grad(exact, leaves, dout.double())],
        budget,
        sizes=sizes,
    )


def test_first_use_from_eight_threads():
    """In a fresh process: nothing is loaded yet, and each result is that of a single thread."""
    code = (
        "import threading, torch\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from dilated_core import DilatedPattern, dilated_attention\n"
        "start = threading.Barrier(8)\n"
        "pattern = DilatedPattern([4, 8], [1, 2])\n"
        f"x = torch.randn(8, 1, 8, 2, 8, device={DEVICE!r})\n"
        "def attend(i):\n"
        "    start.wait()\n"
        "    return dilated_attention(x[i], x[i], x[i], pattern, backend='triton')\n"
        "with ThreadPoolExecutor(8) as pool:\n"
        "    together = list(pool.map(attend, range(8)))\n"
        "alone = [dilated_attention(y, y, y, pattern, backend='triton') for y in x]\n"
        "assert all(map(torch.equal, together, alone))\n"
    )
    interpreted = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | interpreted)
