"""Block-sparse attention against dense attention under its mask, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, merge_partials
from dilated_core.strips.view import is_viewable
from dilated_core.testing.dropout import kept_pairs
from dilated_core.testing.error_budget import assert_within_budget, relative_error
from dilated_sparse import (
    BlockPattern,
    block_sparse_attention,
    block_sparse_attention_with_lse,
    dilated_sparse,
    from_dilated,
    global_local,
    hierarchical,
    is_exact_for,
    local_window,
    pattern_of_type,
    random_blocks,
)
from oracle import dense_attention, masked_rows, position_mask

PATTERNS: dict[str, Callable[[int], BlockPattern]] = {
    "window": lambda n: local_window(n, window=1),
    "diagonal": lambda n: local_window(n, window=0),
    "strided": lambda n: dilated_sparse(n, sparsity_ratio=0.4),
    "sinks": lambda n: global_local(n, window=1, num_global=1),
    "coarse": lambda n: hierarchical(n),
    "random": lambda n: random_blocks(n, num_random=2, seed=3),
    "per_head": lambda n: random_blocks(n, num_random=2, seed=3, num_heads=4),
    "per_pair": lambda n: BlockPattern.per_head(
        [local_window(n, window=2), global_local(n, window=0, num_global=1)]
    ),
    "dense": lambda n: local_window(n, window=n),
}


def leaves(*shapes: tuple[int, ...], dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def check(
    pattern: BlockPattern,
    S: int,
    *,
    block_size: int = 4,
    B: int = 2,
    H: int = 4,
    K: int = 4,
    is_causal: bool = False,
    mask: torch.Tensor | None = None,
    **options,
) -> None:
    """Out, lse and the gradients through both, to rounding in float64."""
    q, k, v = tensors = leaves((B, S, H, 8), (B, S, K, 8), (B, S, K, 8))
    if mask is None:
        visible = position_mask(pattern, S, block_size, H, is_causal=is_causal).expand(B, H, S, S)
    else:
        visible = masked_rows(pattern, mask, block_size, H, is_causal=is_causal)
        options["key_padding_mask"] = mask
    out, lse = block_sparse_attention_with_lse(q, k, v, pattern, block_size, is_causal, **options)
    expected, expected_lse = dense_attention(q, k, v, visible, scale=options.get("scale"))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)
    dout, dlse = leaves(out.shape, lse.shape, seed=1)
    dlse = dlse.detach().masked_fill(lse == -torch.inf, 0)
    grads = torch.autograd.grad((out, lse), tensors, (dout.detach(), dlse))
    exact = torch.autograd.grad(
        (expected, expected_lse.masked_fill(lse == -torch.inf, 0)), tensors, (dout.detach(), dlse)
    )
    for got, wanted in zip(grads, exact, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("S", [24, 23, 21])
@pytest.mark.parametrize("B", [1, 2])  # runs of blocks are views for one batch row only
@pytest.mark.parametrize("name", PATTERNS)
def test_equal_to_dense_attention_under_the_mask(
    name: str, B: int, S: int, is_causal: bool
) -> None:
    check(PATTERNS[name](6), S, B=B, is_causal=is_causal)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("K", [1, 2])
@pytest.mark.parametrize("name", ["strided", "per_head", "per_pair", "sinks"])
def test_heads_of_q_share_heads_of_k(name: str, K: int, backend: str) -> None:
    check(PATTERNS[name](5), 18, K=K, is_causal=True, backend=backend)
    check(PATTERNS[name](5), 18, K=K, backend=backend, scale=-0.7)


@pytest.mark.parametrize("S", [1, 2, 3, 4, 5, 8])
def test_few_positions(S: int) -> None:
    for is_causal in (False, True):
        check(local_window(-(-S // 4), window=1), S, is_causal=is_causal, B=1)


@pytest.mark.parametrize("block_size", [1, 3, 20, 100])
def test_any_block_size(block_size: int) -> None:
    check(local_window(-(-20 // block_size), window=1), 20, block_size=block_size, is_causal=True)


@pytest.mark.parametrize("name", ["strided", "window", "sinks"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_keys_that_nobody_sees(name: str, is_causal: bool) -> None:
    mask = torch.zeros(2, 22, dtype=torch.bool)
    mask[0, :9] = True  # a whole block and more: the first rows see nothing
    mask[1, [3, 4, 17, 21]] = True
    check(PATTERNS[name](6), 22, is_causal=is_causal, mask=mask)
    check(PATTERNS[name](6), 22, is_causal=is_causal, mask=mask | True)
    # Neighbouring batch rows that begin at one position, with a hole in one of them.
    mask = torch.zeros(4, 22, dtype=torch.bool)
    mask[0, :2] = mask[1, :2] = mask[3, :2] = mask[1, 7] = mask[2, 14:] = True
    check(PATTERNS[name](6), 22, B=4, is_causal=is_causal, mask=mask)


def test_masked_rows_may_hold_anything() -> None:
    q, k, v = leaves((1, 12, 2, 8), (1, 12, 2, 8), (1, 12, 2, 8))
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 5:7] = True
    pattern = local_window(3, window=1)
    clean = block_sparse_attention(q, k, v, pattern, 4, key_padding_mask=mask)
    poisoned = [x.detach().masked_fill(mask[..., None, None], torch.nan) for x in (k, v)]
    dirty = [x.requires_grad_() for x in poisoned]
    out = block_sparse_attention(q, *dirty, pattern, 4, key_padding_mask=mask)
    assert torch.equal(out, clean)
    for grad in torch.autograd.grad(out.sum(), [q, *dirty]):
        assert grad.isfinite().all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_blocks_begin_where_documents_begin(is_causal: bool) -> None:
    lengths = [5, 0, 24, 1, 5, 13]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    T = int(bounds[-1])
    q, k, v = tensors = leaves((T, 4, 8), (T, 2, 8), (T, 2, 8))
    pattern = dilated_sparse(7, sparsity_ratio=0.4)
    out, lse = block_sparse_attention_with_lse(
        q, k, v, pattern, 4, is_causal, cu_seqlens=bounds.int()
    )
    alone = [
        block_sparse_attention_with_lse(
            *(x[None, a:b] for x in tensors), pattern.leading(-(-(b - a) // 4)), 4, is_causal
        )
        for a, b in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)
        if b > a
    ]
    assert torch.equal(out, torch.cat([x.out[0] for x in alone]))
    assert torch.equal(lse, torch.cat([x.lse[0] for x in alone]))
    dout = torch.randn_like(out)
    grads = torch.autograd.grad(out, tensors, dout)
    expected = torch.autograd.grad(torch.cat([x.out[0] for x in alone]), tensors, dout)
    for got, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("first", [1, 3, 4, 13, 22])
def test_padding_before_a_sequence_does_not_shift_its_blocks(first: int, is_causal: bool) -> None:
    q, k, v = tensors = leaves((1, 23, 4, 8), (1, 23, 2, 8), (1, 23, 2, 8))
    mask = torch.arange(23)[None] < first
    pattern = global_local(6, window=1, num_global=1)
    padded = block_sparse_attention_with_lse(q, k, v, pattern, 4, is_causal, key_padding_mask=mask)
    alone = block_sparse_attention_with_lse(
        *(x[:, first:] for x in tensors), pattern.leading(-(-(23 - first) // 4)), 4, is_causal
    )
    assert torch.equal(padded.out[:, first:], alone.out)
    assert torch.equal(padded.lse[:, first:], alone.lse)
    assert not padded.out[:, :first].any()
    assert (padded.lse[:, :first] == -torch.inf).all()
    dout = torch.randn_like(q)
    got = torch.autograd.grad(padded.out, tensors, dout)
    expected = torch.autograd.grad(alone.out, tensors, dout[:, first:])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_future_never_leaks() -> None:
    q, k, v = leaves((1, 30, 2, 8), (1, 30, 2, 8), (1, 30, 2, 8))
    pattern = random_blocks(8, num_random=7)
    before = block_sparse_attention(q, k, v, pattern, 4, is_causal=True)
    later = [torch.cat([x[:, :17], x[:, 17:] + 3], 1) for x in (q, k, v)]
    after = block_sparse_attention(*later, pattern, 4, is_causal=True)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_within_the_error_budget(dtype: torch.dtype, is_causal: bool) -> None:
    S, H = 300, 3
    tensors = leaves((2, S, H, 32), (2, S, H, 32), (2, S, H, 32), dtype=dtype)
    dout = leaves((2, S, H, 32), dtype=dtype, seed=1)[0].detach()
    pattern = dilated_sparse(10, sparsity_ratio=0.5)
    mask = position_mask(pattern, S, 32, H, is_causal=is_causal)
    out = block_sparse_attention(*tensors, pattern, 32, is_causal)
    actual = [out, *torch.autograd.grad(out, tensors, dout)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = dense_attention(*wide, mask)[0]
    exact = [expected, *torch.autograd.grad(expected, wide, dout.double())]
    low = [x.transpose(1, 2) for x in tensors]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *low, attn_mask=torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)[None]
    ).transpose(1, 2)
    plain = [dense, *torch.autograd.grad(dense, tensors, dout)]
    budget = [relative_error(a, b) for a, b in zip(plain, exact, strict=True)]
    assert_within_budget(actual, exact, budget)


def test_any_strides() -> None:
    packed = torch.randn(2, 24, 3, 2, 8, dtype=torch.float64)
    q, k, v = packed.unbind(2)
    pattern = dilated_sparse(6, sparsity_ratio=0.5)
    expected = block_sparse_attention(*(x.contiguous() for x in (q, k, v)), pattern, 4)
    torch.testing.assert_close(block_sparse_attention(q, k, v, pattern, 4), expected)
    swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(block_sparse_attention(*swapped, pattern, 4), expected)
    flipped = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v)]
    torch.testing.assert_close(block_sparse_attention(*flipped, pattern, 4), expected)
    one = q[:, :1].expand(-1, 24, -1, -1)
    torch.testing.assert_close(
        block_sparse_attention(one, one, v, pattern, 4),
        block_sparse_attention(one.clone(), one.clone(), v, pattern, 4),
    )


def test_exact_dilated_patterns_give_dilated_attention() -> None:
    q, k, v = (x.detach() for x in leaves((1, 40, 2, 8), (1, 40, 2, 8), (1, 40, 2, 8)))
    dilated = DilatedPattern([8], [1])
    assert is_exact_for(dilated, 40, 4)
    blocks = from_dilated(dilated, 40, 4, 2)
    for is_causal in (False, True):
        torch.testing.assert_close(
            block_sparse_attention(q, k, v, blocks, 4, is_causal),
            dilated_attention(q, k, v, dilated, is_causal=is_causal),
        )


def test_parts_of_a_pattern_merge_to_the_whole() -> None:
    q, k, v = (x.detach() for x in leaves((1, 24, 2, 8), (1, 24, 2, 8), (1, 24, 2, 8)))
    near, far = (
        local_window(6, window=1),
        BlockPattern.from_mask(~local_window(6, window=1).materialize()[0]),
    )
    parts = [block_sparse_attention_with_lse(q, k, v, pattern, 4) for pattern in (near, far)]
    merged = merge_partials(parts)
    whole = block_sparse_attention_with_lse(q, k, v, near | far, 4)
    torch.testing.assert_close(merged.out, whole.out)
    torch.testing.assert_close(merged.lse, whole.lse)


@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_backends_get_views_that_the_contract_allows(
    name: str, B: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dilated_core.backends.sdpa import SdpaBackend

    forward, backward = SdpaBackend.forward, SdpaBackend.backward

    def forward_checked(self, *arguments):
        assert all(is_viewable(x) for x in arguments[:3])
        return forward(self, *arguments)

    def backward_checked(self, *arguments, **options):
        assert all(is_viewable(x) for x in arguments[:5])
        return backward(self, *arguments, **options)

    monkeypatch.setattr(SdpaBackend, "forward", forward_checked)
    monkeypatch.setattr(SdpaBackend, "backward", backward_checked)
    for is_causal in (False, True):
        q, k, v = leaves((B, 46, 4, 8), (B, 46, 4, 8), (B, 46, 4, 8), dtype=torch.float32)
        pattern = PATTERNS[name](12)
        out = block_sparse_attention(q, k, v, pattern, 4, is_causal, backend="sdpa")
        out.backward(torch.randn(46, 8, 4, B).permute(3, 0, 2, 1))


@pytest.mark.parametrize("name", PATTERNS)
def test_positions_decide_what_is_dropped(name: str) -> None:
    S, is_causal = 43, name != "coarse"
    pattern = PATTERNS[name](11)
    tensors = leaves((2, S, 4, 8), (2, S, 2, 8), (2, S, 2, 8))
    mask = position_mask(pattern, S, 4, 4, is_causal=is_causal)
    kept = kept_pairs(_drawn(5), (2, S, 4), dropout_p=0.4)
    expected, _ = dense_attention(*tensors, mask, factors=kept.double() / 0.6)
    torch.manual_seed(5)
    out = block_sparse_attention(*tensors, pattern, 4, is_causal=is_causal, dropout_p=0.4)
    assert relative_error(out, expected) < 1e-12
    dout = torch.randn_like(out)
    grads, want = (torch.autograd.grad(x, tensors, dout) for x in (out, expected))
    for grad, exact in zip(grads, want, strict=True):
        assert relative_error(grad, exact) < 1e-12


def test_documents_drop_by_their_own_positions() -> None:
    q, k, v = (x.detach() for x in leaves((45, 2, 8), (45, 2, 8), (45, 2, 8)))
    pattern = local_window(4, window=1)
    torch.manual_seed(5)
    out = block_sparse_attention(
        q, k, v, pattern, 8, cu_seqlens=torch.tensor([0, 32, 45]), dropout_p=0.5
    )
    for a, b in ((0, 32), (32, 45)):
        kept = kept_pairs(_drawn(5), (1, b - a, 2), first=a, dropout_p=0.5)
        mask = position_mask(local_window(-(-(b - a) // 8), window=1), b - a, 8, 2, is_causal=False)
        part = (x[None, a:b] for x in (q, k, v))
        expected, _ = dense_attention(*part, mask, factors=kept.double() / 0.5)
        assert relative_error(out[a:b], expected[0]) < 1e-12


def _drawn(seed: int) -> int:
    """The seed of dropout that a call draws after `torch.manual_seed`."""
    torch.manual_seed(seed)
    return int(torch.randint(2**62, ()))


def test_work_is_that_of_kept_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from dilated_core.backends.sdpa import SdpaBackend

    pairs = 0
    original = SdpaBackend.forward

    def counted(self, q, k, v, options):
        nonlocal pairs
        pairs += q.shape[0] * q.shape[1] * k.shape[1] * q.shape[2]
        return original(self, q, k, v, options)

    monkeypatch.setattr(SdpaBackend, "forward", counted)
    q, k, v = torch.randn(3, 2, 256, 2, 8).unbind()
    for kind in ("local_window", "dilated_sparse", "global_local", "hierarchical"):
        for is_causal in (False, True):
            pairs = 0
            pattern = pattern_of_type(kind, 32, sparsity_ratio=0.2, is_causal=is_causal)
            block_sparse_attention(q, k, v, pattern, 8, is_causal)
            assert pairs == pattern.num_kept * 8 * 8 * 2 * 2


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (
            ValueError,
            "has 3 blocks; 20 positions in blocks of 4 are 5",
            {"pattern": local_window(3, window=1)},
        ),
        (
            ValueError,
            "lists 3 heads and there are 2",
            {"pattern": random_blocks(5, num_random=1, num_heads=3)},
        ),
        (TypeError, "pattern is a str", {"pattern": "local_window"}),
        (ValueError, "block_size is 0", {"block_size": 0}),
        (TypeError, "is_causal is 1", {"is_causal": 1}),
        (ValueError, "scale is nan", {"scale": float("nan")}),
        (ValueError, "dropout_p is 1", {"dropout_p": 1}),
        (ValueError, "cannot run", {"backend": "sdpa", "dropout_p": 0.1}),
        (ValueError, "nothing", {"backend": "nothing"}),
        (
            ValueError,
            "key_padding_mask has shape",
            {"key_padding_mask": torch.zeros(1, 3, dtype=torch.bool)},
        ),
        (
            ValueError,
            "row 0 of head 0 keeps no block",
            {"pattern": BlockPattern.from_rows([[4]] * 5), "is_causal": True},
        ),
    ],
)
def test_wrong_arguments_are_refused(error, message: str, change: dict) -> None:
    q = torch.randn(1, 20, 2, 8)
    arguments = {"pattern": local_window(5, window=1), "block_size": 4} | change
    with pytest.raises(error, match=message):
        block_sparse_attention(q, q, q, **arguments)


def test_documents_longer_than_the_pattern_are_refused() -> None:
    q = torch.randn(20, 2, 8)
    with pytest.raises(ValueError, match="longest document has 15 positions"):
        block_sparse_attention(
            q, q, q, local_window(3, window=1), 4, cu_seqlens=torch.tensor([0, 5, 20])
        )


def test_autocast_casts_no_integers():
    x = torch.ones(1, 8, 2, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="have dtype"):
        block_sparse_attention(x, x, x, local_window(1, window=0), block_size=8)
