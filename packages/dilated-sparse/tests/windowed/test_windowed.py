"""A window and branches in one softmax, against dense attention with counts of pairs."""

import math

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    merge_partials,
)
from dilated_core.testing.dropout import kept_pairs
from dilated_core.testing.error_budget import assert_within_budget, relative_error
from dilated_sparse import windowed_dilated_attention, windowed_dilated_attention_with_lse
from dilated_sparse.windowed.plan import WINDOW_BRANCH
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERNS = [
    None,
    DilatedPattern([4, 8], [1, 2]),
    DilatedPattern([5, 16, 32], [1, 3, 4]),
    DilatedPattern([16], [5], head_offsets="blocked"),
    DilatedPattern([7, 40], [2, 6]),
]


def counts(
    pattern: DilatedPattern | None, window: int, S: int, H: int, *, is_causal: bool, overlap: str
) -> torch.Tensor:
    """How often each query of each head counts each key: `(H, S, S)`, from the definition."""
    i = torch.arange(S)
    near = (i[:, None] - i).abs() < window
    near = near.tril() if is_causal else near
    if pattern is None:
        return near.long().expand(H, S, S)
    branches = pattern.materialize(S, H, is_causal=is_causal)
    return torch.where(near, 1, branches) if overlap == "once" else branches + near


def dense(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, times: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse in float64, of a softmax in which a pair counts `times` `(…, H, S, S)`."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale + times.double().log()
    sees = (times > 0).any(-1, keepdim=True)
    scores = scores.masked_fill(~sees, 0)
    p = scores.softmax(-1).masked_fill(~sees, 0)
    lse = scores.logsumexp(-1).masked_fill(~sees[..., 0], -math.inf)
    return torch.einsum("bhij,bjhd->bihd", p, v), lse.transpose(1, 2)


def leaves(*shapes: tuple[int, ...], dtype=torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def check(
    pattern: DilatedPattern | None,
    window: int,
    S: int,
    *,
    B: int = 1,
    H: int = 4,
    K: int | None = None,
    is_causal: bool = True,
    overlap: str = "once",
    mask: torch.Tensor | None = None,
    seed: int = 0,
    **options,
) -> None:
    """Out, lse and the gradients through both, to rounding in float64."""
    q, k, v = tensors = leaves(*((B, S, heads, 4) for heads in (H, K or H, K or H)), seed=seed)
    times = counts(pattern, window, S, H, is_causal=is_causal, overlap=overlap)
    if mask is not None:
        times = times * ~mask[:, None, None]
        options["key_padding_mask"] = mask
    result = windowed_dilated_attention_with_lse(
        q, k, v, pattern, window, is_causal, overlap=overlap, **options
    )
    expected = dense(q, k, v, times, options.get("scale") or 0.5)
    for got, wanted in zip(result, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    lse = result.lse
    # Upstream gradients of other strides than out has.
    dout = leaves((S, H, 4, B), seed=1)[0].detach().permute(3, 0, 1, 2)
    dlse = leaves((H, S, B), seed=2)[0].detach().permute(2, 1, 0).masked_fill(lse == -math.inf, 0)
    grads = torch.autograd.grad(result, tensors, (dout, dlse))
    sums = (expected[0] * dout).sum() + (expected[1].masked_fill(lse == -math.inf, 0) * dlse).sum()
    for got, wanted in zip(grads, torch.autograd.grad(sums, tensors), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@settings(max_examples=50, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    window=st.integers(1, 36),
    S=st.integers(1, 33),
    B=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (4, 4), (6, 3), (4, 1)]),
    is_causal=st.booleans(),
    overlap=st.sampled_from(["once", "added"]),
)
def test_equal_to_a_softmax_over_counted_pairs(
    pattern, window, S, B, heads, is_causal, overlap
) -> None:
    check(pattern, window, S, B=B, H=heads[0], K=heads[1], is_causal=is_causal, overlap=overlap)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("overlap", ["once", "added"])
def test_keys_that_nobody_sees(overlap: str, is_causal: bool, backend: str) -> None:
    mask = torch.zeros(2, 22, dtype=torch.bool)
    mask[0, :9] = True  # more than a window: the first rows see nothing
    mask[1, [3, 4, 17, 21]] = True
    options = {"is_causal": is_causal, "overlap": overlap, "backend": backend}
    check(PATTERNS[1], 5, 22, B=2, K=2, mask=mask, **options)
    check(PATTERNS[2], 5, 22, B=2, mask=mask | True, **options)
    check(PATTERNS[1], 5, 22, B=2, scale=-0.7, **options)


def test_masked_rows_may_hold_anything() -> None:
    q, k, v = leaves(*[(1, 12, 2, 8)] * 3)
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 5:7] = True
    call = {"is_causal": True, "key_padding_mask": mask}
    clean = windowed_dilated_attention(q, k, v, PATTERNS[1], 3, **call)
    dirty = [
        x.detach().masked_fill(mask[..., None, None], torch.nan).requires_grad_() for x in (k, v)
    ]
    out = windowed_dilated_attention(q, *dirty, PATTERNS[1], 3, **call)
    assert torch.equal(out, clean)
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), [q, *dirty]))


@pytest.mark.parametrize("is_causal", [False, True])
def test_documents_are_sequences_of_their_own(is_causal: bool) -> None:
    lengths = [5, 0, 24, 1, 5, 13]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    q, k, v = tensors = leaves(*((int(bounds[-1]), heads, 8) for heads in (4, 2, 2)))
    pattern = PATTERNS[1]
    packed = windowed_dilated_attention_with_lse(
        q, k, v, pattern, 3, is_causal, cu_seqlens=bounds.int()
    )
    alone = [
        windowed_dilated_attention_with_lse(*(x[None, a:b] for x in tensors), pattern, 3, is_causal)
        for a, b in zip(bounds.tolist(), bounds[1:].tolist(), strict=False)
        if b > a
    ]
    whole = [torch.cat([part[i][0] for part in alone]) for i in (0, 1)]
    torch.testing.assert_close(list(packed), whole)
    upstream = [torch.randn_like(x) for x in packed]
    grads = [torch.autograd.grad(x, tensors, upstream) for x in (packed, whole)]
    torch.testing.assert_close(*grads)


def test_a_window_over_everything_is_dense_attention() -> None:
    q, k, v = (x.detach() for x in leaves(*[(2, 20, 3, 8)] * 3))
    for is_causal in (False, True):
        expected = dilated_attention(q, k, v, DilatedPattern([20], [1]), is_causal=is_causal)
        for pattern in PATTERNS:
            out = windowed_dilated_attention(q, k, v, pattern, 20, is_causal)
            torch.testing.assert_close(out, expected)


def test_added_is_the_merge_of_both_attentions() -> None:
    """And `once` of branches that the window holds as a whole is the window."""
    q, k, v = (x.detach() for x in leaves(*[(2, 30, 4, 8)] * 3))
    pattern = DilatedPattern([6, 20], [1, 3])
    for is_causal in (False, True):
        parts = [
            windowed_dilated_attention_with_lse(q, k, v, None, 7, is_causal),
            dilated_attention_with_lse(q, k, v, pattern, is_causal=is_causal),
        ]
        whole = windowed_dilated_attention_with_lse(q, k, v, pattern, 7, is_causal, overlap="added")
        torch.testing.assert_close(whole, merge_partials(parts))
        inside = windowed_dilated_attention_with_lse(
            q, k, v, DilatedPattern([6], [1]), 7, is_causal
        )
        torch.testing.assert_close(inside, parts[0])


@pytest.mark.parametrize("overlap", ["once", "added"])
def test_zero_keys_of_padding_count_as_in_dilated_attention(overlap: str) -> None:
    q, k, v = (x.detach() for x in leaves(*[(1, 30, 4, 8)] * 3))
    pattern = DilatedPattern([8, 16], [1, 4], padding="attended")
    masked = DilatedPattern([8, 16], [1, 4])
    out, lse = windowed_dilated_attention_with_lse(q, k, v, pattern, 5, overlap=overlap)
    plain = windowed_dilated_attention_with_lse(q, k, v, masked, 5, overlap=overlap)
    zeros = [dilated_attention_with_lse(q, k, v, p).lse.exp() for p in (pattern, masked)]
    wanted = torch.logaddexp(plain.lse, (zeros[0] - zeros[1]).clamp_min(0).log())
    torch.testing.assert_close(lse, wanted)
    torch.testing.assert_close(out, plain.out * (plain.lse - wanted).exp().unsqueeze(-1))


def test_heads_of_a_range_are_those_of_the_whole() -> None:
    q, k, v = (x.detach() for x in leaves(*[(1, 40, 6, 8)] * 3))
    pattern = DilatedPattern([8, 40], [1, 4])
    for is_causal in (False, True):
        whole = windowed_dilated_attention(q, k, v, pattern, 5, is_causal)
        part = windowed_dilated_attention(
            *(x[:, :, 3:] for x in (q, k, v)), pattern, 5, is_causal, head_range=(3, 6)
        )
        torch.testing.assert_close(part, whole[:, :, 3:])


def test_the_future_never_leaks() -> None:
    q, k, v = (x.detach() for x in leaves(*[(1, 30, 2, 8)] * 3))
    before = windowed_dilated_attention(q, k, v, PATTERNS[2], 6, is_causal=True)
    later = [torch.cat([x[:, :17], x[:, 17:] + 3], 1) for x in (q, k, v)]
    after = windowed_dilated_attention(*later, PATTERNS[2], 6, is_causal=True)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_within_the_error_budget(dtype: torch.dtype, is_causal: bool) -> None:
    S, H, window = 301, 3, 50
    tensors = leaves(*[(2, S, H, 32)] * 3, dtype=dtype)
    dout = leaves((2, S, H, 32), dtype=dtype, seed=1)[0].detach()
    pattern = DilatedPattern([64, 301], [1, 4])
    times = counts(pattern, window, S, H, is_causal=is_causal, overlap="once")
    out = windowed_dilated_attention(*tensors, pattern, window, is_causal)
    actual = [out, *torch.autograd.grad(out, tensors, dout)]
    wide = [x.detach().double().requires_grad_() for x in tensors]
    expected = dense(*wide, times, 32**-0.5)[0]
    exact = [expected, *torch.autograd.grad(expected, wide, dout.double())]
    low = [x.transpose(1, 2) for x in tensors]
    plain = torch.nn.functional.scaled_dot_product_attention(
        *low, attn_mask=times.log().to(dtype)[None]
    ).transpose(1, 2)
    budget = [
        relative_error(a, b)
        for a, b in zip([plain, *torch.autograd.grad(plain, tensors, dout)], exact, strict=True)
    ]
    assert_within_budget(actual, exact, budget)


def test_any_strides() -> None:
    packed = torch.randn(2, 24, 3, 2, 8, dtype=torch.float64)
    q, k, v = packed.unbind(2)

    def attend(*tensors: torch.Tensor) -> torch.Tensor:
        return windowed_dilated_attention(*tensors, PATTERNS[1], 6, is_causal=True)

    expected = attend(*(x.contiguous() for x in (q, k, v)))
    torch.testing.assert_close(attend(q, k, v), expected)
    for dims in ((1, 2), (1, 3)):
        moved = [x.transpose(*dims).contiguous().transpose(*dims) for x in (q, k, v)]
        torch.testing.assert_close(attend(*moved), expected)
    one = q[:, :1].expand(-1, 24, -1, -1)
    torch.testing.assert_close(attend(one, one, v), attend(one.clone(), one.clone(), v))


@pytest.mark.parametrize("S", [512, 500])
def test_work_is_that_of_counted_pairs_in_few_calls(
    monkeypatch: pytest.MonkeyPatch, S: int
) -> None:
    """Causal calls of M rows hold M(M + 1)/2 pairs; nothing of the size S × S is made."""
    from dilated_core.backends.sdpa import SdpaBackend

    calls: list[int] = []
    original = SdpaBackend.forward

    def counted(self, q, k, v, options):
        M, N = q.shape[1], k.shape[1]
        pairs = M * (M + 1) // 2 if options.is_causal else M * N
        calls.append(q.shape[0] * q.shape[2] * pairs)
        return original(self, q, k, v, options)

    monkeypatch.setattr(SdpaBackend, "forward", counted)
    q, k, v = torch.randn(3, 1, S, 4, 8).unbind()
    pattern = DilatedPattern([64, 512], [1, 4])
    for is_causal in (False, True):
        calls.clear()
        windowed_dilated_attention(q, k, v, None, 16, is_causal)
        near = counts(None, 16, S, 4, is_causal=is_causal, overlap="once")
        assert sum(calls) == int(near.sum())
        assert len(calls) <= 8
        calls.clear()
        windowed_dilated_attention(q, k, v, pattern, 16, is_causal)
        times = counts(pattern, 16, S, 4, is_causal=is_causal, overlap="once")
        assert sum(calls) == int(times.sum())


@pytest.mark.parametrize("overlap", ["once", "added"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_positions_decide_what_is_dropped(pattern, is_causal, overlap) -> None:
    S, H, window, p = 33, 6, 6, 0.4
    tensors = leaves((2, S, H, 4), (2, S, 3, 4), (2, S, 3, 4))
    torch.manual_seed(5)
    seed = int(torch.randint(2**62, ()))
    near = counts(None, window, S, H, is_causal=is_causal, overlap=overlap)
    kept = near * kept_pairs(seed, (2, S, H), dropout_p=p, branch=WINDOW_BRANCH)
    branches = () if pattern is None else pattern.branches
    for number, (w, r) in enumerate(branches):
        branch = DilatedPattern([w], [r], head_offsets=pattern.head_offsets)
        pairs = branch.materialize(S, H, is_causal=is_causal)
        pairs = pairs * (1 - near) if overlap == "once" else pairs
        kept = kept + pairs * kept_pairs(seed, (2, S, H), dropout_p=p, branch=number)
    q, k, v = tensors
    k_, v_ = (x.repeat_interleave(2, 2) for x in (k, v))
    times = counts(pattern, window, S, H, is_causal=is_causal, overlap=overlap)
    lse = dense(q, k, v, times, 0.5)[1].transpose(1, 2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k_) * 0.5
    probabilities = kept.double() / (1 - p) * (scores - lse.unsqueeze(-1)).exp()
    expected = torch.einsum("bhij,bjhd->bihd", probabilities, v_)
    torch.manual_seed(5)
    out = windowed_dilated_attention(
        q, k, v, pattern, window, is_causal, overlap=overlap, dropout_p=p
    )
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    dout = torch.randn_like(out)
    grads, want = (torch.autograd.grad(x, tensors, dout) for x in (out, expected))
    for got, wanted in zip(grads, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "window is 0; it must be at least 1", {"window": 0}),
        (TypeError, r"window is 2\.5; it must be an integer", {"window": 2.5}),
        (ValueError, "overlap is 'twice'", {"overlap": "twice"}),
        (TypeError, "pattern is a list", {"pattern": [8]}),
        (TypeError, "is_causal is 1", {"is_causal": 1}),
        (ValueError, "scale is nan", {"scale": float("nan")}),
        (ValueError, "dropout_p is 1", {"dropout_p": 1}),
        (ValueError, "cannot run", {"backend": "sdpa", "dropout_p": 0.1}),
        (ValueError, "head_range", {"head_range": (1, 2)}),
        (
            ValueError,
            "key_padding_mask has shape",
            {"key_padding_mask": torch.zeros(1, 3, dtype=torch.bool)},
        ),
    ],
)
def test_wrong_arguments_are_refused(error, message: str, change: dict) -> None:
    q = torch.randn(1, 20, 2, 8)
    arguments = {"pattern": PATTERNS[1], "window": 4} | change
    with pytest.raises(error, match=message):
        windowed_dilated_attention(q, q, q, **arguments)


def test_no_positions_and_no_sequences() -> None:
    for shape in ((2, 0, 2, 4), (0, 5, 2, 4)):
        q, k, v = tensors = leaves(*[shape] * 3)
        out = windowed_dilated_attention(q, k, v, PATTERNS[1], 3)
        assert out.shape == shape
        assert all(x.shape == shape for x in torch.autograd.grad(out.sum(), tensors))
