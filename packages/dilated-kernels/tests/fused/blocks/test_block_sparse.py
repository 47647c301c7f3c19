"""The block-sparse kernels against dense attention in float64 under the mask of the lists."""

import inspect

import pytest
import torch
from dilated_core import AttentionInputs, AttentionOptions
from dilated_core.backends.contract import BlockLists, BlockSparseBackend, has_capability
from dilated_core.backends.registry import choose_backend, forget_choices, get_backend
from dilated_core.testing import assert_within_budget, relative_error
from dilated_core.testing.error_budget import pytorch_errors
from dilated_kernels import availability
from dilated_kernels.fused import TritonBackend
from dilated_kernels.fused.blocks import attention
from dilated_kernels.fused.tuning import Tuning

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
if torch.cuda.is_available():
    DEVICES = DEVICES[1:]  # compiled kernels are tested instead of interpreted ones


def lists_of(kept, block_size, device="cpu"):
    """The lists of `kept` `(P, N, N)` bool."""
    P = kept.shape[0]

    def packed(kept):
        ends = kept.sum(-1).flatten().cumsum(0).view(P, -1)
        starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
        return torch.cat([starts[:, None], ends], 1), kept.nonzero()[:, 2].int()

    tensors = (*packed(kept), *packed(kept.mT))
    return BlockLists(block_size, *(x.to(device) for x in tensors))


def dense(q, k, v, kept, block_size, options):
    """Out and lse in float64, differentiable."""
    S, H = q.shape[1:3]
    seen = kept.repeat_interleave(H // kept.shape[0], 0).to(q.device)
    seen = seen.repeat_interleave(block_size, 1).repeat_interleave(block_size, 2)[:, :S, :S]
    seen = seen.tril() if options.is_causal else seen
    if (hidden := options.key_padding_mask) is not None:
        seen = seen & ~hidden[:, None, None, :]
        k, v = (x.masked_fill(hidden[:, :, None, None], 0) for x in (k, v))
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(H // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * options.scale
    scores = scores.masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.where(lse > -torch.inf, 0).unsqueeze(-1)).exp()
    return torch.einsum("bhij,bjhd->bihd", p, v), lse.mT


def attend(q, k, v, kept, block_size, options, dout, dlse):
    """Out, lse, dq, dk, dv of the backend."""
    backend, lists = get_backend("triton"), lists_of(kept, block_size, q.device)
    out, lse = backend.block_sparse_forward(q, k, v, lists, options)
    delta = (dout.float() * out.float()).sum(-1) - dlse
    rows = lse.masked_fill(lse == -torch.inf, torch.inf)
    return out, lse, *backend.block_sparse_backward(dout, q, k, v, rows, delta, lists, options)


def compare(S, kept, block_size, *, heads=2, kv_heads=2, D=16, batch=1, device="cpu", **options):
    torch.manual_seed(0)
    options = AttentionOptions(**{"is_causal": False, "scale": 0.3, **options})
    q, dout = torch.randn(2, batch, heads, S, D, device=device).transpose(2, 3)
    k, v = torch.randn(2, batch, S, kv_heads, D, device=device)
    dlse = torch.randn(batch, heads, S, device=device).mT
    if (hidden := options.key_padding_mask) is not None:
        k, v = (x.masked_fill(hidden[:, :, None, None], torch.nan) for x in (k, v))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    exact = dense(*leaves, kept, block_size, options)
    sees = exact[1] > -torch.inf
    want = torch.autograd.grad(
        (exact[0], exact[1].where(sees, 0)), leaves, (dout.double(), dlse.double() * sees)
    )
    out, lse, *grads = attend(q, k, v, kept, block_size, options, dout, dlse)
    assert torch.equal(lse > -torch.inf, sees)
    assert (out[~sees] == 0).all()
    assert relative_error(lse.where(sees, 0), exact[1].where(sees, 0)) <= 1e-5
    for got, expected in zip([out, *grads], [exact[0], *want], strict=True):
        assert got.is_contiguous()
        assert relative_error(got, expected) <= 1e-5


def random_blocks(P, N, *, seed=0):
    """Blocks with the diagonal, and about a third of the others."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(P, N, N, generator=generator) < 0.35
    return kept | torch.eye(N, dtype=torch.bool)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("S", "block_size", "P", "options"),
    [
        (1, 16, 1, {}),
        (75, 16, 1, {"batch": 2}),
        (75, 16, 2, {"is_causal": True, "heads": 4}),
        (64, 32, 1, {"is_causal": True, "D": 24, "scale": -0.2}),
        (70, 16, 4, {"heads": 4, "kv_heads": 1}),  # heads of one group with lists of their own
        (40, 16, 1, {"heads": 4, "kv_heads": 2, "is_causal": True}),
    ],
)
def test_out_lse_and_gradients_equal_dense_attention(S, block_size, P, options, device):
    kept = random_blocks(P, -(-S // block_size))
    if options.get("is_causal"):
        kept = kept.tril()
    compare(S, kept, block_size, device=device, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_of_several_tiles(is_causal, device):
    """Tiles of 16 and 32 in blocks of 64."""
    backend = TritonBackend(
        configs={"forward": (32, 16, 4, 1), "dq": (16, 32, 4, 1), "dk_dv": (32, 16, 4, 1)}
    )
    kept = torch.tensor([[[True, False], [True, True]]])
    q, k, v, dout = torch.randn(4, 1, 100, 1, 16, device=device).unbind()
    options, lists = AttentionOptions(is_causal, 0.25), lists_of(kept, 64, device)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    exact = dense(*leaves, kept, 64, options)
    want = torch.autograd.grad(exact[0], leaves, dout.double())
    out, lse = backend.block_sparse_forward(q, k, v, lists, options)
    grads = backend.block_sparse_backward(dout, q, k, v, lse, (dout * out).sum(-1), lists, options)
    for got, expected in zip([out, lse, *grads], [*exact, *want], strict=True):
        assert relative_error(got, expected) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
def test_masked_keys_may_hold_nan_and_rows_may_see_nothing(device):
    hidden = torch.zeros(2, 50, dtype=torch.bool, device=device)
    hidden[0, 5:9] = hidden[1, :20] = hidden[1, 45:] = True
    kept = torch.eye(4, dtype=torch.bool)[None]  # the first block of batch row 1 has no key
    compare(50, kept, 16, batch=2, key_padding_mask=hidden, device=device)
    kept = random_blocks(1, 4).tril()
    compare(50, kept, 16, batch=2, key_padding_mask=hidden, is_causal=True, device=device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_and_a_column_may_be_empty(device):
    kept = torch.eye(3, dtype=torch.bool)[None].clone()
    kept[0, 1, 1] = False
    compare(40, kept, 16, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_within_the_error_budget(dtype, device):
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 1, 96, 1, 16, device=device).to(dtype).unbind()
    kept, options = torch.ones(1, 3, 3, dtype=torch.bool).tril(), AttentionOptions(True, 0.25)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    exact, _ = dense(*leaves, kept, 32, options)
    want = torch.autograd.grad(exact, leaves, dout.double())
    dlse = torch.zeros(1, 96, 1, device=device)
    out, lse, *grads = attend(q, k, v, kept, 32, options, dout, dlse)
    assert lse.dtype == torch.float32
    assert_within_budget(
        [out, *grads], [exact, *want], pytorch_errors(*leaves, dout, is_causal=True)
    )


def launches(S, kept, *, head_dim=64, **options):
    """The launches of forward and backward for tensors without data."""
    q, k, v, dout = (torch.empty(1, S, 4, head_dim, device="meta") for _ in range(4))
    lse = torch.empty(1, S, 4, device="meta")
    lists, options = (
        lists_of(kept, 64),
        AttentionOptions(**{"is_causal": True, "scale": 1.0, **options}),
    )
    call = attention.Call(q, k, v, lists, options, Tuning((9, 0), "tf32"))
    yield attention.forward_launch(call, q, lse)
    yield from attention.backward_launches(call, dout, lse, lse, (q, k, v))


def test_launches_are_one_per_kernel_and_differ_in_values_alone():
    """Constants are compiled, and are the same for all lengths and lists; programs read no list."""
    few, many = launches(100, torch.ones(1, 2, 2).bool()), launches(1000, random_blocks(2, 16))
    for small, large in zip(few, many, strict=True):
        assert small.constants == large.constants
        names = inspect.signature(small.kernel.fn).parameters
        assert not set(names) - set(list(names)[: len(small.arguments)]) - set(small.constants)
        tile = small.constants[
            "BLOCK_N" if small.kernel.fn.__name__ == "dk_dv_kernel" else "BLOCK_M"
        ]
        assert small.grid == (-(-100 // tile) * 4,)
        assert large.grid == (-(-1000 // tile) * 4,)


@pytest.mark.parametrize(
    ("block_size", "dropout_p", "reason"),
    [
        (48, 0.0, "block_size is 48; its block-sparse kernels take a power of two of 16 or more."),
        (8, 0.0, "block_size is 8; its block-sparse kernels take a power of two of 16 or more."),
        (64, 0.1, "dropout_p is 0.1; its block-sparse kernels have no dropout."),
    ],
)
def test_what_the_kernels_cannot_is_a_reason_and_an_error(block_size, dropout_p, reason):
    backend = get_backend("triton")
    assert has_capability(backend, BlockSparseBackend)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = AttentionInputs(device, torch.float32, 2, 16, dropout_p, is_rectangular=True)
    assert backend.why_not(inputs._replace(block_size=block_size)) == [reason]
    assert backend.why_not(inputs._replace(block_size=64, dropout_p=0.0)) == []
    q = torch.zeros(1, 16, 1, 16, device=device)
    lists = lists_of(torch.ones(1, 1, 1, dtype=torch.bool), block_size, device)
    with pytest.raises(ValueError, match=reason.partition(";")[0]):
        backend.block_sparse_forward(
            q, q, q, lists, AttentionOptions(False, 1.0, dropout_p=dropout_p)
        )


def test_auto_takes_the_kernels_on_a_gpu_where_they_can_run(monkeypatch):
    monkeypatch.setattr(availability, "cuda_capability", lambda device: (9, 0))
    inputs = AttentionInputs(
        torch.device("cuda"), torch.bfloat16, 2, 64, is_rectangular=True, block_size=64
    )
    forget_choices()
    assert choose_backend("auto", inputs).name == "triton"
    for change in ({"block_size": None}, {"block_size": 48}, {"dropout_p": 0.1}):
        assert choose_backend("auto", inputs._replace(**change)).name != "triton"
    forget_choices()


def test_no_positions():
    q = torch.zeros(2, 0, 2, 16)
    lists = lists_of(torch.ones(1, 1, 1, dtype=torch.bool), 16)
    options, rows = AttentionOptions(False, 1.0), torch.zeros(2, 0, 2)
    backend = get_backend("triton")
    assert backend.block_sparse_forward(q, q, q, lists, options).lse.shape == (2, 0, 2)
    grads = backend.block_sparse_backward(q, q, q, q, rows, rows, lists, options)
    assert all(grad.shape == q.shape for grad in grads)
