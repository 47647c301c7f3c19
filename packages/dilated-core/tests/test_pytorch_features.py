"""What users of PyTorch take for granted: autocast, meta tensors, inductor, FSDP, determinism."""

from contextlib import nullcontext

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    MultiheadDilatedAttention,
    dilated_attention,
    dilated_attention_with_lse,
    reference_dilated_attention,
)
from dilated_core.testing import relative_error, run_processes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])
BRANCHES = {"segment_lengths": [8, 24], "dilation_rates": [1, 3]}


def _tensors(*shape, dtype=torch.float32):
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_autocast_casts_as_pytorchs_attention_does(backend):
    q, k, v = _tensors(2, 50, 4, 8)
    # As rotary positions leave it: q and k in float32, v from a linear layer in bfloat16.
    with torch.autocast("cpu", torch.bfloat16):
        out = dilated_attention(q, k, v.bfloat16(), PATTERN, backend=backend)
    assert out.dtype == torch.bfloat16
    low = [x.detach().bfloat16().requires_grad_() for x in (q, k, v)]
    expected = dilated_attention(*low, PATTERN, backend=backend)
    # Inside, nothing is cast once more: float32 sums stay float32.
    assert torch.equal(out, expected)
    dout = torch.randn_like(out)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad(out, (q, k), dout)
    want = torch.autograd.grad(expected, low[:2], dout)
    assert [grad.dtype for grad in grads] == [torch.float32] * 2
    assert all(torch.equal(a, e.float()) for a, e in zip(grads, want, strict=True))


def test_without_autocast_nothing_is_cast():
    q, k, v = _tensors(1, 20, 2, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert dilated_attention(q, k, v, PATTERN).dtype == torch.float32
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"dtype torch.int64; it must"):
        dilated_attention(q.long(), k.long(), v.long(), PATTERN)


def test_a_layer_under_autocast():
    mha = MultiheadDilatedAttention(24, 4, **BRANCHES)
    x = torch.randn(2, 30, 24)
    with torch.autocast("cpu", torch.bfloat16):
        y = mha(x, x, x, is_causal=True)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, mha(x, x, x, is_causal=True)) < 0.02
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in mha.parameters())


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_meta_tensors_give_shapes(kv_heads):
    q = torch.empty(2, 2**20, 4, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    k = torch.empty(2, 2**20, kv_heads, 64, dtype=torch.bfloat16, device="meta", requires_grad=True)
    out, lse = dilated_attention_with_lse(q, k, k, PATTERN)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, q.dtype, "meta")
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
    out.sum().backward()
    assert (q.grad.shape, k.grad.shape) == (q.shape, k.shape)


def test_deterministic_mode():
    """No kernel that deterministic mode refuses, and the same bits in every run."""
    pattern = DilatedPattern([16, 40], [1, 4])
    results = []
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(3):
            torch.manual_seed(0)
            q, k, v = _tensors(2, 77, 6, 8)
            mask = torch.rand(2, 77) < 0.2
            out = dilated_attention(q, k, v, pattern, dropout_p=0.2, key_padding_mask=mask)
            results.append([out, *torch.autograd.grad(out, (q, k, v), torch.randn_like(out))])
    finally:
        torch.use_deterministic_algorithms(False)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


# Inductor itself uses what it deprecates.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor_with_any_length():
    """One graph for all lengths, forward and backward, masks included."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def attend(q, k, v, mask):
        out = dilated_attention(q * 2, k, v, PATTERN, is_causal=True, key_padding_mask=mask)
        return out * 2

    for length in (50, 37, 64):
        q, k, v = _tensors(2, length, 4, 8)
        mask = torch.rand(2, length) < 0.3
        out = attend(q, k, v, mask)
        exact = 2 * reference_dilated_attention(
            q * 2, k, v, PATTERN, is_causal=True, key_padding_mask=mask
        )
        assert relative_error(out, exact) < 1e-6
        dout = torch.randn_like(out)
        got = torch.autograd.grad(out, (q, k, v), dout)
        want = torch.autograd.grad(exact, (q, k, v), dout.double())
        assert all(relative_error(a, e) < 1e-5 for a, e in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_packed_documents():
    attend = torch.compile(
        lambda q, bounds: dilated_attention(q, q, q, PATTERN, cu_seqlens=bounds),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for bounds in ([0, 13, 50], [0, 5, 6, 40]):
        q = torch.randn(bounds[-1], 4, 8)
        bounds = torch.tensor(bounds)
        expected = dilated_attention(q, q, q, PATTERN, cu_seqlens=bounds)
        assert torch.equal(attend(q, bounds), expected)


def _network():
    torch.manual_seed(0)
    layers = [
        nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True) for _ in range(2)
    ]
    for layer in layers:
        layer.self_attn = MultiheadDilatedAttention(24, 4, **BRANCHES)
    return nn.Sequential(*layers)


def _train(network, x):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        network(x).square().mean().backward()
        optimizer.step()


def _train_sharded():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    network = _network()
    for layer in network:
        fully_shard(layer)
    fully_shard(network)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(4, 40, 24, generator=torch.Generator().manual_seed(1))
    _train(network, x.chunk(world_size)[rank])
    return {name: p.full_tensor().detach() for name, p in network.named_parameters()}


def test_fsdp_on_two_ranks_equals_one_process():
    one = _network()
    _train(one, torch.randn(4, 40, 24, generator=torch.Generator().manual_seed(1)))
    start = dict(_network().named_parameters())
    for sharded in run_processes(_train_sharded, 2):
        for name, p in one.named_parameters():
            torch.testing.assert_close(sharded[name], p.detach(), rtol=1e-4, atol=1e-6)
    # It has learned: equality is not that of untouched weights.
    assert all((p - start[name]).abs().max() > 1e-6 for name, p in one.named_parameters()
               if "k_proj.bias" not in name)  # fmt: skip


class _Seen(TorchDispatchMode):
    """Names of the operators that run under it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_whoever_looks_sees_the_operators():
    """Without a dispatch mode a call takes a shorter way; the results are the same."""
    q, k, v = (torch.randn(2, 20, 4, 8, requires_grad=True) for _ in range(3))
    dout = torch.randn(2, 20, 4, 8)
    pattern = DilatedPattern([8, 20], [1, 2])
    results = []
    for mode in (nullcontext(), seen := _Seen()):
        with mode:
            out = dilated_attention(q, k, v, pattern)
            results.append([out, *torch.autograd.grad(out, (q, k, v), dout)])
    assert seen.names.count("dilated_core::attention_forward") == 1
    assert seen.names.count("dilated_core::attention_backward") == 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.profiler.profile() as profile:
        dilated_attention(q, k, v, pattern)
    names = {event.key for event in profile.key_averages()}
    assert "dilated_core::attention_forward" not in names  # the shorter way was taken
