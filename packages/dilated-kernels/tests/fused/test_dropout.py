"""Dropout in the kernels: a mask by position, the same in forward and backward and in any tiles."""

import pytest
import torch
import triton
import triton.language as tl
from dilated_core import DilatedPattern, dilated_attention_with_lse
from dilated_core.backends.contract import AttentionOptions
from dilated_core.testing import Case, relative_error
from dilated_kernels.fused import TritonBackend
from dilated_kernels.fused.arithmetic import keep_factor
from dilated_kernels.fused.tuning import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
def test_dropout_is_a_function_of_positions(is_causal):
    """Equal to the definition under the same mask, with whatever tiles; forward and backward."""
    pattern = DilatedPattern([16, 40], [1, 2])
    case = Case(seq_len=40, num_heads=2, pattern=pattern, is_causal=is_causal)
    want = with_dropout(case, 1234567890123, 0.3)
    q, k, v, dout = case.tensors(dtype=torch.float32, device=DEVICE)
    options = AttentionOptions(is_causal, case.head_dim**-0.5, 0.3, 1234567890123)
    for tile in ((64, 64), (16, 16), (16, 32)):
        configs = dict.fromkeys(("forward", "dq", "dk_dv"), Config(*tile, 4, 2))
        kernel = TritonBackend(configs=configs)
        with torch.no_grad():
            out, lse = kernel.dilated_forward(q, k, v, pattern, options, cu_seqlens=None)
            tensors = (dout, None, q, k, v, out, lse)
            grads = kernel.dilated_backward(*tensors, pattern, options, cu_seqlens=None)
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
        q, k, v, _ = case.tensors(dtype=torch.float32, device=DEVICE)
        results.append(
            dilated_attention_with_lse(q, k, v, case.pattern, dropout_p=0.5, backend="triton")
        )
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    assert not torch.equal(results[0][0], results[2][0])
    assert torch.equal(results[0][1], results[2][1])  # dropout does not change the lse
