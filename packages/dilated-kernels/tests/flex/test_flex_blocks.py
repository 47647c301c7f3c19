"""`flex` over lists of blocks, against dense attention in float64 under the mask of the lists.

On CPU PyTorch's flex_attention has no backward, and reads no lists where it returns an lse. Its
eager implementation runs here with the check of the device taken out. A stand-in computes what
flex_attention documents from the lists alone.
"""

import importlib
import math

import pytest
import torch
from dilated_core import AttentionInputs, AttentionOptions
from dilated_core.backends.contract import BlockLists, BlockSparseBackend, has_capability
from dilated_core.testing import relative_error
from dilated_kernels import availability
from dilated_kernels.flex import blocks as flex_blocks
from dilated_kernels.flex import call as flex_call
from dilated_kernels.flex.backend import flex
from torch._dynamo.utils import counters

PYTORCH = "torch.nn.attention.flex_attention"


def lists_of(kept, block_size, device="cpu"):
    """The lists of `kept` `(P, N, N)` bool."""
    P = kept.shape[0]

    def packed(kept):
        ends = kept.sum(-1).flatten().cumsum(0).view(P, -1)
        starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])
        return torch.cat([starts[:, None], ends], 1), kept.nonzero()[:, 2].int()

    return BlockLists(block_size, *(x.to(device) for x in (*packed(kept), *packed(kept.mT))))


def random_blocks(P, N, *, is_causal, seed=0):
    """About a third of the blocks; the diagonal of even rows only."""
    kept = torch.rand(P, N, N, generator=torch.Generator().manual_seed(seed)) < 0.35
    kept |= torch.diag(torch.arange(N) % 2 == 0)
    return kept.tril() if is_causal else kept


def table_of(counts, numbers, num_columns):
    """`(1, P, N, N)` bool from padded rows; each row ascends."""
    _, P, N = counts.shape
    table = torch.zeros(1, P, N, num_columns, dtype=torch.bool)
    for p in range(P):
        for i in range(N):
            row = numbers[0, p, i, : counts[0, p, i]].long()
            assert (row.diff() > 0).all()
            table[0, p, i, row] = True
    return table


def listed_flex(q, k, v, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
    """flex_attention with its lse as a kernel computes it: only what the lists of the mask hold."""
    (B, H, S, _), size = q.shape, block_mask.BLOCK_SIZE[0]
    assert (size, size) == block_mask.BLOCK_SIZE
    assert block_mask.seq_lengths == (S, S)
    assert score_mod is None
    assert enable_gqa == (k.shape[1] != H)
    tiles = [value for name, value in kernel_options.items() if "BLOCK" in name]
    assert all(size % tile == 0 for tile in tiles)
    assert len(tiles) == (0 if size % 128 == 0 else 6)
    N = -(-S // size)

    def lists(name):
        full = getattr(block_mask, f"full_{name}_num_blocks")
        pairs = [getattr(block_mask, f"{name}_{x}") for x in ("num_blocks", "indices")]
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in pairs)
        pairs = table_of(*pairs, N)
        if full is None:
            return pairs, torch.zeros_like(pairs)
        return pairs, table_of(full, getattr(block_mask, f"full_{name}_indices"), N)

    pairs, full = lists("kv")
    assert pairs.shape[1] in (1, H)
    if block_mask.q_indices is not None:  # the columns hold the same blocks
        assert torch.equal(torch.stack(lists("q")).mT, torch.stack((pairs, full)))
    else:
        assert not q.requires_grad
    pairs, full = (
        x.repeat_interleave(size, 2).repeat_interleave(size, 3)[..., :S, :S] for x in (pairs, full)
    )
    b, h, i, j = torch.meshgrid(*map(torch.arange, (B, H, S, S)), indexing="ij")
    seen = (pairs & block_mask.mask_mod(b, h, i, j)) | full
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    scores = ((q @ k.mT) * scale).masked_fill(~seen, -math.inf)
    empty = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return p @ v, lse


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
    scores = scores.masked_fill(~seen, -math.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.where(lse > -math.inf, 0).unsqueeze(-1)).exp()
    return torch.einsum("bhij,bjhd->bihd", p, v), lse.mT


def compare(S, P, block_size, *, is_causal, heads=4, kv_heads=2, hidden=None, device="cpu"):
    """Out, lse and gradients, the latter given an lse and a delta over more keys, too."""
    torch.manual_seed(0)
    kept = random_blocks(P, -(-S // block_size), is_causal=is_causal)
    dtype = torch.float64 if device == "cpu" else torch.float32
    q, dout = torch.randn(2, 2, heads, S, 8, dtype=dtype, device=device).transpose(2, 3)
    k, v = torch.randn(2, 2, S, kv_heads, 8, dtype=dtype, device=device)
    options = AttentionOptions(is_causal, 0.3, key_padding_mask=hidden)
    if hidden is not None:
        k, v = (x.masked_fill(hidden[:, :, None, None], math.nan) for x in (k, v))
    lists = lists_of(kept, block_size, device)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    exact, exact_lse = dense(*leaves, kept, block_size, options)
    sees = exact_lse > -math.inf
    out, lse = flex.block_sparse_forward(q, k, v, lists, options)
    assert torch.equal(lse > -math.inf, sees)
    bound = 1e-10 if device == "cpu" else 1e-4
    assert relative_error(out, exact) <= bound
    assert relative_error(lse.where(sees, 0), exact_lse.where(sees, 0)) <= bound
    # As if more keys had been merged: m more of the softmax's denominator, and o elsewhere.
    more, delta = torch.rand_like(lse), torch.randn_like(lse)
    p_of_ours = (-more).exp()
    own = p_of_ours.unsqueeze(-1) * dout
    through = p_of_ours * ((dout * exact.detach().to(dtype)).sum(-1) - delta)
    want = torch.autograd.grad(
        (exact, exact_lse.where(sees, 0)), leaves, (own.double(), (through * sees).double())
    )
    merged = (lse + more).masked_fill(~sees, math.inf)
    got = flex.block_sparse_backward(dout, q, k, v, merged, delta, lists, options)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) <= bound


@pytest.fixture
def by_lists(monkeypatch):
    """The path of a GPU over a stand-in that reads the lists."""
    monkeypatch.setattr(flex_blocks, "is_compiled", lambda kind: True)
    monkeypatch.setattr(flex_call, "_flex_attention", lambda kind, mask: listed_flex)
    monkeypatch.setattr(flex_call, "_has_backward", lambda kind: True)


@pytest.fixture
def by_pytorch(monkeypatch):
    """PyTorch's eager flex_attention, forward and backward."""
    pytorch = importlib.import_module(PYTORCH)
    monkeypatch.setattr(pytorch, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(pytorch, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(flex_call, "_has_backward", lambda kind: True)


CASES = [
    (1, 1, 16, 4, 2),
    (75, 1, 16, 4, 4),
    (64, 2, 16, 4, 1),  # lists for parts of a group of heads
    (70, 4, 16, 4, 2),
    (100, 2, 48, 4, 2),
    (130, 1, 128, 2, 2),
]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("S", "P", "size", "heads", "kv_heads"), CASES)
def test_lists_hold_the_blocks(by_lists, S, P, size, heads, kv_heads, is_causal):
    compare(S, P, size, heads=heads, kv_heads=kv_heads, is_causal=is_causal)


def masked_keys(S, device="cpu"):
    hidden = torch.zeros(2, S, dtype=torch.bool, device=device)
    hidden[0, 5:9] = hidden[1, :20] = hidden[1, S - 5 :] = True
    return hidden


@pytest.mark.parametrize("is_causal", [False, True])
def test_masked_keys_may_hold_nan_and_rows_may_see_nothing(by_lists, is_causal):
    compare(50, 1, 16, is_causal=is_causal, hidden=masked_keys(50))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
def test_pytorch_itself(by_pytorch, is_causal, is_masked):
    """Any size of a block, which eager flex_attention allows."""
    compare(25, 2, 5, is_causal=is_causal, hidden=masked_keys(25) if is_masked else None)


@pytest.mark.gpu
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_masked", [False, True])
@pytest.mark.parametrize(("S", "P", "size", "heads", "kv_heads"), CASES)
def test_on_a_gpu(S, P, size, heads, kv_heads, is_causal, is_masked):
    hidden = masked_keys(S, "cuda") if is_masked else None
    options = {"heads": heads, "kv_heads": kv_heads, "is_causal": is_causal, "hidden": hidden}
    compare(S, P, size, device="cuda", **options)


def test_memory_is_that_of_kept_blocks():
    """A window of 3 blocks of 10,000, where a table of all pairs would have 10⁸ entries."""
    N = 10_000
    offsets = torch.arange(0, 3 * N + 1, 3)[None]
    blocks = ((torch.arange(N)[:, None] + torch.tensor([-1, 0, 1])) % N).sort().values.int()
    lists = BlockLists(16, offsets, blocks.flatten(), offsets, blocks.flatten())
    rows, columns = flex_blocks._both(flex_blocks._Key(lists), 8, False, False)
    assert sum(x.numel() for x in (*rows.full, *columns.full)) == 2 * (N + 3 * N)


def test_lists_are_padded_once(by_lists):
    lists = lists_of(random_blocks(1, 4, is_causal=True), 16)
    x = torch.randn(1, 60, 2, 8)
    before = flex_blocks._both.cache_info()
    for _ in range(3):
        _, lse = flex.block_sparse_forward(x, x, x, lists, AttentionOptions(True, 0.3))
        flex.block_sparse_backward(x, x, x, x, lse, lse, lists, AttentionOptions(True, 0.3))
    after = flex_blocks._both.cache_info()
    assert (after.misses, after.hits) == (before.misses + 1, before.hits + 5)


@pytest.mark.parametrize("is_masked", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_other_lengths_and_lists_compile_nothing(monkeypatch, is_masked):
    """The path of a GPU up to code generation: one graph, whatever the lengths and the lists."""
    compiled = torch.compile(
        flex_call._flex_with_lse, fullgraph=True, dynamic=True, backend="eager"
    )
    for module in (flex_blocks, flex_call):
        monkeypatch.setattr(module, "is_compiled", lambda kind: True)
    monkeypatch.setattr(flex_call, "_compiled", lambda is_dynamic: compiled)
    torch._dynamo.reset()
    counters.clear()
    for S, seed in ((63, 0), (200, 1), (205, 2), (3000, 3)):
        N = -(-S // 16)
        # The first lists have rows of 4 blocks, as many as there are heads.
        kept = torch.ones(1, N, N, dtype=torch.bool).tril() if S == 63 else None
        kept = random_blocks(1, N, is_causal=True, seed=seed) if kept is None else kept
        q, hidden = torch.randn(2, S, 4, 16), torch.zeros(2, S, dtype=torch.bool)
        options = AttentionOptions(True, 0.25, key_padding_mask=hidden if is_masked else None)
        flex.block_sparse_forward(q, q, q, lists_of(kept, 16), options)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.exhaustive
def test_a_compiled_kernel_reads_the_lists():
    """PyTorch's kernel for CPU, which returns no lse, and takes rows of N blocks only."""
    flex_attention = importlib.import_module(PYTORCH).flex_attention
    compiled = torch.compile(
        lambda *tensors, **options: flex_attention(*tensors, **options),
        fullgraph=True,
        dynamic=True,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_blocks, "is_compiled", lambda kind: True)
        for S in (100, 200):
            N = -(-S // 16)
            kept = random_blocks(1, N, is_causal=True)
            q, k, v = torch.randn(3, 1, S, 2, 16)
            options, lists = AttentionOptions(True, 0.25), lists_of(kept, 16)
            mask = flex_blocks.list_mask(lists, q, options, has_columns=False).block_mask
            for name in ("kv_indices", "full_kv_indices"):
                rows = getattr(mask, name)
                padded = torch.nn.functional.pad(rows, (0, N - rows.shape[-1]))
                setattr(mask, name, padded)
            with torch.no_grad():
                heads = (x.transpose(1, 2) for x in (q, k, v))
                out = compiled(*heads, block_mask=mask, scale=0.25).transpose(1, 2)
            exact, _ = dense(q, k, v, kept, 16, options)
            assert relative_error(out, exact) <= 1e-5


def test_what_it_cannot_is_a_reason_and_an_error(monkeypatch):
    assert has_capability(flex, BlockSparseBackend)
    monkeypatch.setattr(availability, "cuda_capability", lambda device: (9, 0))
    cuda = AttentionInputs(torch.device("cuda"), torch.bfloat16, 2, 64, is_rectangular=True)
    reason = "block_size is 40; its block-sparse attention takes a multiple of 16."
    assert flex.why_not(cuda._replace(block_size=40)) == [reason]
    assert flex.why_not(cuda._replace(block_size=48)) == []
    assert flex.why_not(cuda._replace(block_size=40, device=torch.device("cpu"))) == []
    assert flex_blocks.block_reasons("cuda", 40) == [reason]
    x, lists = torch.zeros(1, 16, 1, 16), lists_of(torch.ones(1, 1, 1, dtype=torch.bool), 16)
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1"):
        flex.block_sparse_forward(x, x, x, lists, AttentionOptions(False, 1.0, dropout_p=0.1))
    rows = x[..., 0]
    with pytest.raises(NotImplementedError, match="use backend='sdpa'"):
        flex.block_sparse_backward(x, x, x, x, rows, rows, lists, AttentionOptions(False, 1.0))


def test_no_positions():
    q, lists = torch.zeros(2, 0, 2, 16), lists_of(torch.ones(1, 1, 1, dtype=torch.bool), 16)
    options, rows = AttentionOptions(False, 1.0), torch.zeros(2, 0, 2)
    assert flex.block_sparse_forward(q, q, q, lists, options).lse.shape == (2, 0, 2)
    grads = flex.block_sparse_backward(q, q, q, q, rows, rows, lists, options)
    assert all(grad.shape == q.shape for grad in grads)
