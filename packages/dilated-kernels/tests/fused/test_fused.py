"""What the suite of every backend does not ask of the fused kernels."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
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
from dilated_kernels.fused.arithmetic import keep_factor
from dilated_kernels.fused.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles of queries and keys in each segment, although the segments are short."""
    monkeypatch.setattr(launch, "choose_config", lambda *_: Config(16, 16, 4, 2))


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


def assert_exact(case):
    for got, want in zip(attend(case), exact(case), strict=True):
        empty = want == -torch.inf
        assert torch.equal(got == -torch.inf, empty)
        assert relative_error(got.masked_fill(empty, 0), want.masked_fill(empty, 0)) < 5e-6


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "config",
    [(16, 32), (32, 16), (64, 16), (16, 64)],
    ids=lambda sizes: f"{sizes[0]} queries, {sizes[1]} keys",
)
def test_tiles_of_any_shape(monkeypatch, config, is_causal):
    monkeypatch.setattr(launch, "choose_config", lambda *_: Config(*config, 4, 2))
    pattern = DilatedPattern([50, 100], [1, 2], padding="attended")
    assert_exact(
        Case(
            seq_len=90,
            num_heads=4,
            num_kv_heads=2,
            pattern=pattern,
            is_causal=is_causal,
            masked=0.2,
        )
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("rows", [15, 16, 17, 31, 32, 33])
def test_segments_end_anywhere_in_a_tile(monkeypatch, rows, is_causal):
    """With one row in the last tile, too, and another head's rows to come after it."""
    monkeypatch.setattr(launch, "choose_config", lambda *_: Config(16, 16, 4, 2))
    pattern = DilatedPattern([rows], [1])
    assert_exact(
        Case(seq_len=rows, num_heads=4, num_kv_heads=2, pattern=pattern, is_causal=is_causal)
    )


@pytest.mark.parametrize("head_dim", [3, 16, 48, 96, 200])
def test_any_head_dim(head_dim):
    pattern = DilatedPattern([16, 40], [1, 2])
    assert_exact(Case(seq_len=40, num_heads=2, head_dim=head_dim, pattern=pattern))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rates", [[2], [2, 3], [3, 1], [1, 1]], ids=str)
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


# Dropout


@triton.jit
def _mask_kernel(
    result, seed, branch, sequence, start, rate, dropout_p, ROWS: tl.constexpr, STRIDE: tl.constexpr
):
    row = tl.arange(0, ROWS)
    factor = keep_factor(seed, branch, sequence, start, rate, row[:, None], row[None, :], dropout_p)
    tl.store(result + row[:, None] * STRIDE + row[None, :], factor)


def dropout_mask(seed, branch, sequence, seq_len, dropout_p):
    """keep_factor of every pair of positions, `(S, S)`, from one call with rate 1."""
    rows = triton.next_power_of_2(seq_len)
    result = torch.empty(rows, rows, device=DEVICE)
    _mask_kernel[(1,)](result, seed, branch, sequence, 0, 1, dropout_p, rows, rows)
    return result[:seq_len, :seq_len].double()


def with_dropout(case, seed, dropout_p):
    """The definition, with the probability of each branch's key kept or dropped."""
    q, k, v, dout = (x.double() for x in case.tensors(dtype=torch.float32, device=DEVICE))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    S, H = case.seq_len, case.num_heads
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
    counts = torch.zeros(1, H, S, S, device=DEVICE, dtype=torch.float64)
    kept = torch.zeros_like(counts)
    for i, (w, r) in enumerate(case.pattern.branches):
        alone = DilatedPattern([w], [r]).materialize(S, H, is_causal=case.is_causal).to(DEVICE)
        counts += alone
        kept[0] += alone * torch.stack([dropout_mask(seed, i, h, S, dropout_p) for h in range(H)])
    weight = scores.exp() / (counts * scores.exp()).sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhd->bqhd", weight * kept, v)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_is_a_function_of_positions(monkeypatch, is_causal):
    """Equal to the definition under the same mask, with whatever tiles; forward and backward."""
    pattern = DilatedPattern([16, 40], [1, 2])
    case = Case(seq_len=40, num_heads=2, pattern=pattern, is_causal=is_causal)
    want = with_dropout(case, 1234567890123, 0.3)
    kernel = get_backend("triton")
    q, k, v, dout = case.tensors(dtype=torch.float32, device=DEVICE)
    options = {
        "is_causal": is_causal,
        "scale": case.head_dim**-0.5,
        "dropout_p": 0.3,
        "dropout_seed": 1234567890123,
        "key_padding_mask": None,
        "cu_seqlens": None,
    }
    for tile in ((64, 64), (16, 16), (16, 32)):
        monkeypatch.setattr(launch, "choose_config", lambda *_, tile=tile: Config(*tile, 4, 2))
        with torch.no_grad():
            out, lse = kernel.dilated_forward(q, k, v, pattern, **options)
            grads = kernel.dilated_backward(dout, None, q, k, v, out, lse, pattern, **options)
        for got, exact_ in zip((out, *grads), want, strict=True):
            assert relative_error(got, exact_) < 5e-6


def test_dropout_drops_what_it_should():
    masks = [
        dropout_mask(seed, branch, head, 256, 0.25)
        for seed, branch, head in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1 + 2**33, 0, 0)]
    ]
    for mask in masks:
        assert set(mask.unique().tolist()) == {0.0, torch.tensor(4 / 3).item()}
        # 65536 draws: five standard deviations.
        assert abs((mask == 0).double().mean() - 0.25) < 5 * (0.25 * 0.75 / 65536) ** 0.5
    for i, one in enumerate(masks):
        for other in masks[:i]:
            both = ((one == 0) & (other == 0)).double().mean()
            assert abs(both - 0.0625) < 5 * (0.0625 * 0.9375 / 65536) ** 0.5


def test_dropout_follows_the_seed_of_torch():
    case = Case(seq_len=20, num_heads=2, pattern=DilatedPattern([20], [1]))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(attend(case, dropout_p=0.5))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])  # the lse knows nothing of it


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


def test_the_order_of_launches_is_dilated_first():
    pattern = DilatedPattern([8, 32, 16, 8], [1, 4, 2, 1])
    launches = launch.plan_launches(pattern, 40, None)
    assert [(plan.branch, plan.rate) for plan in launches] == [(1, 4), (2, 2), (0, 1), (3, 1)]


# Tile order


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("is_causal", [False, True])
def test_hilbert_order_gives_the_same_bits(is_causal):
    pattern = DilatedPattern([48, 100], [1, 2])
    case = Case(seq_len=180, num_heads=2, num_kv_heads=1, pattern=pattern, is_causal=is_causal)
    register_backend(TritonBackend(tile_order="hilbert", name="triton-hilbert"))
    try:
        table = launch.order_table("hilbert", 4, 3, torch.device(DEVICE))
        assert table is not None
        assert table.tolist() != list(range(12))
        got = attend(case, backend="triton-hilbert")
    finally:
        unregister_backend("triton-hilbert")
    assert all(torch.equal(a, b) for a, b in zip(got, attend(case), strict=True))


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
            assert launch.dot_precision(torch.bfloat16) == "tf32"  # which says nothing there
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "the dtype is float64; it takes float32, bfloat16, float16"),
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
