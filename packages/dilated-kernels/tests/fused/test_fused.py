"""Properties of the fused kernels beyond the suite of every backend."""

import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    available_backends,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.registry import get_backend
from dilated_core.testing import Case, assert_within_budget, relative_error
from dilated_core.testing.error_budget import pytorch_errors
from dilated_kernels.fused import TritonBackend, launch
from dilated_kernels.fused.tile_order import order_table
from dilated_kernels.fused.tuning import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


SMALL = (16, 16, 4, 2)
"""Several tiles of queries and keys in each segment, although the segments are short."""


@contextmanager
def registered(config, **options):
    """The name of a backend whose kernels all have this config."""
    configs = dict.fromkeys(("forward", "dq", "dk_dv"), Config(*config))
    register_backend(TritonBackend(configs=configs, name="triton-test", **options))
    try:
        yield "triton-test"
    finally:
        unregister_backend("triton-test")


def attend(case, dtype=torch.float32, backend="triton", **options):
    q, k, v, dout = case.tensors(dtype=dtype, device=DEVICE)
    out, lse = dilated_attention_with_lse(
        q, k, v, case.pattern, **case.options(device=DEVICE), **options, backend=backend
    )
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dout.sum(-1).to(lse.dtype)))
    return [out.detach(), lse.detach(), *grads]


def exact(case, dtype=torch.float32):
    q, k, v, dout = case.tensors(dtype=dtype, device=DEVICE)
    out, lse = reference_dilated_attention_with_lse(
        q, k, v, case.pattern, **case.options(device=DEVICE)
    )
    grads = torch.autograd.grad((out, lse), (q, k, v), (dout.double(), dout.double().sum(-1)))
    return [out.detach(), lse.detach(), *grads]


def assert_exact(case, backend="triton"):
    for got, want in zip(attend(case, backend=backend), exact(case), strict=True):
        empty = want == -torch.inf
        assert torch.equal(got == -torch.inf, empty)
        assert relative_error(got.masked_fill(empty, 0), want.masked_fill(empty, 0)) < 5e-6


@pytest.mark.parametrize(
    ("config", "is_causal"),
    [((16, 32), False), ((32, 16), True), ((64, 16), False), ((16, 64), True)],
    ids=lambda value: f"{value[0]} queries, {value[1]} keys" if isinstance(value, tuple) else "",
)
def test_tiles_of_any_shape(config, is_causal):
    case = Case(
        seq_len=90,
        num_heads=4,
        num_kv_heads=2,
        pattern=DilatedPattern([50, 100], [1, 2], padding="attended"),
        is_causal=is_causal,
        masked=0.2,
    )
    with registered((*config, 4, 2)) as name:
        assert_exact(case, name)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rows", [15, 16, 17, 31, 32, 33])
def test_segments_end_anywhere_in_a_tile(rows, is_causal):
    """With one row in the last tile, too, and another head's rows to come after it."""
    pattern = DilatedPattern([rows], [1])
    case = Case(seq_len=rows, num_heads=4, num_kv_heads=2, pattern=pattern, is_causal=is_causal)
    with registered(SMALL) as name:
        assert_exact(case, name)


@pytest.mark.parametrize("head_dim", [3, 16, 48, 96, 200])
def test_any_head_dim(head_dim):
    pattern = DilatedPattern([16, 40], [1, 2])
    assert_exact(Case(seq_len=40, num_heads=2, head_dim=head_dim, pattern=pattern))


@pytest.mark.parametrize(
    ("dtype", "rates"),
    [
        *((torch.bfloat16, [2]), (torch.float16, [2, 3])),
        *((torch.bfloat16, [3, 1]), (torch.float16, [1, 1])),
    ],
    ids=str,
)
def test_half_precision_whatever_launch_is_last(dtype, rates):
    """With a last rate above 1 the result comes from the float32 buffer, else from a launch."""
    case = Case(seq_len=60, head_dim=16, pattern=DilatedPattern([30] * len(rates), rates))
    q, k, v, dout = case.tensors(dtype=dtype, device=DEVICE)
    out, lse = dilated_attention_with_lse(q, k, v, case.pattern, backend="triton")
    exact_out, exact_lse = reference_dilated_attention_with_lse(q, k, v, case.pattern)
    assert torch.equal(lse == -torch.inf, exact_lse == -torch.inf)
    assert_within_budget(
        [out, *torch.autograd.grad(out, (q, k, v), dout)],
        [exact_out, *torch.autograd.grad(exact_out, (q, k, v), dout.double())],
        pytorch_errors(q, k, v, dout, is_causal=False),
    )


# Memory


@pytest.mark.gpu
def test_forward_needs_one_float32_copy_of_the_output():
    pattern = DilatedPattern([2048, 4096, 8192], [1, 2, 4])
    q, k, v = torch.randn(3, 1, 65536, 12, 64, device="cuda", dtype=torch.bfloat16).unbind()
    dilated_attention(q, k, v, pattern, backend="triton")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out, lse = dilated_attention_with_lse(q, k, v, pattern, backend="triton")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak <= out.nbytes + lse.nbytes + 2 * out.nbytes + 2**20


# Tile order


def test_hilbert_order_gives_the_same_bits():
    pattern = DilatedPattern([48, 100], [1, 2])
    case = Case(seq_len=140, num_heads=2, num_kv_heads=1, pattern=pattern, is_causal=True)
    table = order_table("hilbert", 3, 3, torch.device(DEVICE))
    assert table is not None
    assert table.tolist() != list(range(9))
    results = []
    for tile_order in ("hilbert", "row_major"):
        with registered(SMALL, tile_order=tile_order) as name:
            results.append(attend(case, backend=name))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="tile_order is 'zigzag'; it must be one of 'row_major'"):
        TritonBackend(tile_order="zigzag")


# Choice


def test_float32_products_follow_the_setting_of_torch(monkeypatch):
    monkeypatch.setattr(launch, "is_interpreted", lambda: False)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert launch.dot_precision(torch.float32) == precision
            assert (
                launch.dot_precision(torch.bfloat16) == "tf32"
            )  # half precision has one precision
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "the dtype is float64; it takes float32, bfloat16, float16"),
        ({"dtype": torch.int64}, "the dtype is int64; it takes float32, bfloat16, float16"),
        ({"is_rectangular": True}, "k has other rows than q; its kernels need as many keys"),
        ({"head_dim": 257}, "head_dim is 257; it takes at most 256"),
        ({"max_workspace_bytes": 1000}, "max_workspace_bytes is 1000; it accumulates"),
        ({"device": torch.device("mps")}, "the device is mps; it runs on CUDA devices only"),
    ],
)
def test_why_not(changes, reason):
    inputs = AttentionInputs(torch.device(DEVICE), torch.float32, num_heads=4, head_dim=64)
    backend = get_backend("triton")
    assert backend.why_not(inputs) == []
    assert backend.why_not(inputs._replace(dropout_p=0.5, has_key_padding_mask=True)) == []
    (got,) = backend.why_not(inputs._replace(**changes))
    assert reason in got


def test_auto_never_takes_the_interpreter():
    x = torch.randn(1, 8, 2, 8)
    inputs = AttentionInputs(x.device, x.dtype, num_heads=2, head_dim=8)
    assert get_backend("triton").priority_for(inputs).value < 0
    assert available_backends()[0] == "triton"


def test_without_a_gpu_nothing_loads_the_kernels():
    """The entry point is found, its reason is given, and no kernel is imported for that."""
    code = (
        "import sys, torch\n"
        "import dilated_kernels\n"
        "from dilated_core import DilatedPattern, dilated_attention, explain_backends\n"
        "x = torch.randn(1, 8, 2, 8)\n"
        "dilated_attention(x, x, x, DilatedPattern([8], [1]))\n"
        "print(explain_backends())\n"
        "try:\n"
        "    dilated_attention(x, x, x, DilatedPattern([8], [1]), backend='triton')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "assert 'dilated_kernels.fused.forward' not in sys.modules\n"
    )
    environment = {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert "sdpa      can run, and is what 'auto' takes" in result.stdout
    assert "TRITON_INTERPRET=1 turns on" in result.stdout
    assert "backend 'triton' cannot run float32 on cpu" in result.stdout


@pytest.mark.parametrize("padding", ["masked", "attended"])
def test_scores_far_below_zero(padding):
    """Their exponentials are 0 in float32; their softmax is not. Segments without zero keys too."""
    pattern = DilatedPattern([8, 24], [1, 2], padding=padding)
    q = torch.full((1, 24, 2, 8), 20.0, device=DEVICE)
    k = q.neg() + torch.randn(q.shape, device=DEVICE) / 100
    v = torch.randn(q.shape, device=DEVICE)
    out, lse = dilated_attention_with_lse(q, k, v, pattern, backend="triton")
    exact_out, exact_lse = reference_dilated_attention_with_lse(q, k, v, pattern)
    assert (lse < -1000).all()
    assert relative_error(lse, exact_lse) < 1e-6
    # Scores of a thousand are known to a ten-thousandth.
    assert relative_error(out, exact_out) < 1e-3
