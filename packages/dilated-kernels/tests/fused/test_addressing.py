"""Where the kernels read and write: offsets of 32 and 64 bits, long tensors, slots of heads."""

import pytest
import torch
import triton
import triton.language as tl
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.pattern.branches import head_offset
from dilated_core.testing import Case
from dilated_kernels.fused import launch
from dilated_kernels.fused.addressing import row_pointers
from dilated_kernels.fused.configs import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _offset_kernel(result, base, first, stride, ROWS: tl.constexpr, WIDE: tl.constexpr):
    row = tl.arange(0, ROWS)
    dims = tl.arange(0, 16)
    pointers = row_pointers(base, first, row, tl.cast(stride, tl.int64), dims, WIDE)
    offsets = pointers.to(tl.int64) - tl.cast(base, tl.int64)
    tl.store(result + row[:, None] * 16 + dims[None, :], offsets)


@pytest.mark.parametrize(
    ("stride", "wide"), [(2**40 + 8, True), (2**31 // 32 - 1, False), (1, True)]
)
def test_offsets_of_rows(stride, wide):
    """Where a tile begins always has 64 bits; its rows beyond the first only if told so."""
    result = torch.empty(32, 16, dtype=torch.int64, device=DEVICE)
    base = torch.empty(1, device=DEVICE)
    first = 2**20
    _offset_kernel[(1,)](result, base, first, stride, 32, wide)
    want = (first + torch.arange(32)[:, None]) * stride + torch.arange(16)
    assert torch.equal(result.cpu(), want * 4)


def options(mask=None):
    return launch.Options(False, 1.0, 0.0, 0, mask, None, "row_major")


def strided(stride):
    """A tensor `(1, 2, 4, 16)` whose positions are `stride` elements apart, on no device."""
    return torch.empty_strided((1, 2, 4, 16), (2 * stride, stride, 16, 1), device="meta")


def test_64_bits_are_used_where_32_do_not_suffice():
    """A tile of 128 rows at a rate of 16: positions may be 2^20 elements apart, and not more."""
    config = Config(128, 64, 8, 2)
    plan = launch.plan_launches(DilatedPattern([2**20], [16]), 2**20, None)[0]
    near, far = strided(2**20 - 1), strided(2**20)
    assert not launch.is_wide(config, plan, options(), near, near, near)
    for i in range(4):
        tensors = [near] * 4
        tensors[i] = far
        assert launch.is_wide(config, plan, options(), *tensors)
    # Results are contiguous: 2^20 = H · D here.
    many_heads = torch.empty((1, 2, 2**16, 16), device="meta").as_strided(
        (1, 2, 2**16, 16), (1, 1, 1, 1)
    )
    assert launch.is_wide(config, plan, options(), many_heads, near, near)
    # Of each row, backward reads two values besides.
    thin = torch.empty((1, 2, 2**19, 1), device="meta").as_strided((1, 2, 2**19, 1), (1, 1, 1, 1))
    assert launch.is_wide(config, plan, options(), thin, near, near)
    mask = torch.empty_strided((1, 2), (2**21, 2**20), device="meta")
    assert launch.is_wide(config, plan, options(mask), near, near, near)
    assert launch.is_wide(Config(64, 128, 8, 2), plan, options(), near, far, near)
    assert not launch.is_wide(Config(64, 64, 8, 2), plan, options(), near, far, near)


def test_launches_ask_about_everything_that_they_read(monkeypatch):
    asked = []
    monkeypatch.setattr(
        launch, "is_wide", lambda *args: asked.append([x.stride(1) for x in args[3:]])
    )
    q, k, v, dout = (
        torch.zeros(1, 8, 2 + i, 16, device=DEVICE)[:, :, :2].requires_grad_() for i in range(4)
    )
    out = dilated_attention(q, k, v, DilatedPattern([8], [1]), backend="triton")
    torch.autograd.grad(out, (q, k, v), dout)
    assert asked == [[32, 48, 64], [32, 48, 64, 80], [32, 48, 64, 80]]


@pytest.mark.parametrize("is_causal", [False, True])
def test_64_bits_give_the_same_bits(monkeypatch, is_causal):
    case = Case(
        seq_len=50, num_heads=4, num_kv_heads=2, pattern=DilatedPattern([20, 50], [1, 3]),
        is_causal=is_causal, masked=0.2,
    )  # fmt: skip
    monkeypatch.setattr(launch, "choose_config", lambda *_, **__: Config(16, 16, 4, 2))
    results = []
    for wide in (False, True):
        monkeypatch.setattr(launch, "is_wide", lambda *_, wide=wide: wide)
        q, k, v, dout = case.tensors(dtype=torch.float32, device=DEVICE)
        out = dilated_attention(
            q, k, v, case.pattern, **case.options(device=DEVICE), backend="triton"
        )
        results.append([out.detach(), *torch.autograd.grad(out, (q, k, v), dout)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
def test_tensors_beyond_two_to_the_31_elements(is_causal):
    """The last segment of a long sequence is what it is alone."""
    w, H, D = 4096, 16, 64
    S = 2**31 // (H * D) + 2 * w
    pattern = DilatedPattern([w, 2 * w], [1, 4])
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, S, H, D, device="cuda", dtype=torch.bfloat16, generator=generator)
        for _ in range(4)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*leaves, pattern, is_causal=is_causal, backend="triton")
    grads = torch.autograd.grad(out, leaves, dout)
    last = slice(S - 2 * w, S)
    tail = [x[:, last].detach().clone().requires_grad_() for x in (q, k, v)]
    alone = dilated_attention(*tail, pattern, is_causal=is_causal, backend="triton")
    assert torch.equal(out[:, last], alone)
    for got, want in zip(grads, torch.autograd.grad(alone, tail, dout[:, last]), strict=True):
        assert torch.equal(got[:, last], want)


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (12, 3), (6, 1), (10, 5)])
def test_every_head_has_one_slot(head_offsets, heads, kv_heads):
    """Programs of the dk/dv kernel: heads with one key head and one offset, each counted once."""
    for rate in range(1, 14):
        group = heads // kv_heads
        offsets = [head_offset(h, rate, heads, head_offsets) for h in range(heads)]
        most = max(
            max(offsets[g * group : (g + 1) * group])
            - min(offsets[g * group : (g + 1) * group])
            + 1
            if head_offsets == "blocked"
            else len(set(offsets[g * group : (g + 1) * group]))
            for g in range(kv_heads)
        )
        pattern = DilatedPattern([16], [rate], head_offsets=head_offsets)
        assert launch.count_slots(heads, kv_heads, rate, pattern) == most
