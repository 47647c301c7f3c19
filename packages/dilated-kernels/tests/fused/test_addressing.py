"""Where the kernels read and write: offsets of 32 and 64 bits, long tensors, slots of heads."""

import pytest
import torch
import triton
import triton.language as tl
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.pattern.branches import head_offset
from dilated_core.testing import Case
from dilated_kernels.fused import attention
from dilated_kernels.fused.addressing import row_pointers
from dilated_kernels.fused.attention import Accumulation, Call, Options, is_wide
from dilated_kernels.fused.branches import count_slots, place_branches
from dilated_kernels.fused.tuning import Config, Tuning

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_TILES = dict.fromkeys(("forward", "dq", "dk_dv"), Config(16, 16, 4, 2))


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
    """The start of a tile always has 64 bits; the offsets of its rows have them only with WIDE."""
    result = torch.empty(32, 16, dtype=torch.int64, device=DEVICE)
    base = torch.empty(1, device=DEVICE)
    first = 2**20
    _offset_kernel[(1,)](result, base, first, stride, 32, wide)
    want = (first + torch.arange(32)[:, None]) * stride + torch.arange(16)
    assert torch.equal(result.cpu(), want * 4)


def strided(stride):
    """A tensor `(1, 2, 4, 16)` whose positions are `stride` elements apart, on no device."""
    return torch.empty_strided((1, 2, 4, 16), (2 * stride, stride, 16, 1), device="meta")


def test_64_bits_are_used_where_32_do_not_suffice():
    """A tile of 128 rows at a rate of 16: positions may be 2^20 elements apart, and not more."""
    config, rate, no_mask = Config(128, 64, 8, 2), 16, 0
    near, far = strided(2**20 - 1), strided(2**20)
    assert not is_wide(config, rate, no_mask, near, near, near)
    for i in range(4):
        tensors = [near] * 4
        tensors[i] = far
        assert is_wide(config, rate, no_mask, *tensors)
    # Results are contiguous: 2^20 = H · D here.
    many_heads = torch.empty((1, 2, 2**16, 16), device="meta").as_strided(
        (1, 2, 2**16, 16), (1, 1, 1, 1)
    )
    assert is_wide(config, rate, no_mask, many_heads, near, near)
    # Of each row, backward reads two values besides.
    thin = torch.empty((1, 2, 2**19, 1), device="meta").as_strided((1, 2, 2**19, 1), (1, 1, 1, 1))
    assert is_wide(config, rate, no_mask, thin, near, near)
    assert is_wide(config, rate, 2**20, near, near, near)
    assert is_wide(Config(64, 128, 8, 2), rate, no_mask, near, far, near)
    assert not is_wide(Config(64, 64, 8, 2), rate, no_mask, near, far, near)


def test_launches_check_every_tensor_that_they_read():
    """Each of q, k, v, the mask and dout in turn has positions 2³¹ / 16 elements apart."""
    far = 2**27
    pattern = DilatedPattern([256], [1])
    tuning = Tuning((8, 0), "ieee")

    def strided(is_far, *shape):
        strides = (0, far if is_far else 64, *(16 if n == 2 else 1 for n in shape[2:]))
        return torch.empty_strided(shape, strides, device="meta")

    for i in range(6):
        q, k, v, dout = (strided(i == n, 1, 256, 2, 16) for n in range(4))
        mask_strides = (0, far if i == 4 else 1)
        mask = torch.empty_strided((1, 256), mask_strides, device="meta", dtype=torch.bool)
        call = Call(
            q, k, v, pattern, Options(False, 1.0, 0.0, 0, mask, None), tuning,
            place_branches(pattern, 256, None),
        )  # fmt: skip
        out = Accumulation(q, call.branches, is_read_unwritten=False)
        values = torch.empty(1, 256, 2, 2, device="meta")
        (forward,) = attention.forward_launches(call, out, values[..., 0])
        (dq,) = attention.dq_launches(call, dout, values, out)
        (dk_dv,) = attention.dk_dv_launches(call, dout, values, out, out)
        assert forward.constants["WIDE"] == (i in (0, 1, 2, 4))
        assert dq.constants["WIDE"] == dk_dv.constants["WIDE"] == (i < 5)


def test_64_bits_give_the_same_bits():
    pattern = DilatedPattern([20, 50], [1, 3])
    case = Case(
        seq_len=50, num_heads=4, num_kv_heads=2, pattern=pattern, is_causal=True, masked=0.2
    )
    q, k, v, dout = (x.detach() for x in case.tensors(dtype=torch.float32, device=DEVICE))
    mask = case.options(device=DEVICE)["key_padding_mask"]
    options = Options(True, 0.3, 0.0, 0, mask, None)
    usual = attention.tuning_for(q, "row_major", SMALL_TILES)
    results = []
    for tuning in (usual, usual._replace(is_wide=True)):
        out, lse = attention.dilated_forward(q, k, v, case.pattern, options, tuning)
        grads = attention.dilated_backward(
            dout, None, q, k, v, out, lse, case.pattern, options, tuning
        )
        results.append([out, lse, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.large
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
        assert count_slots(heads, kv_heads, rate, pattern) == most
