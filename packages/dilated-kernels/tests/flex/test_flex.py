"""`flex` on CPU: forward by PyTorch's own flex_attention, backward over a stand-in for it.

PyTorch's flex_attention has no backward on CPU. The stand-in computes what flex_attention
documents, from the same functions of indices, and can be differentiated. On a GPU
test_vendor_conformance.py runs the real one.
"""

import importlib
import math
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    available_backends,
    dilated_attention,
    dilated_attention_with_lse,
    register_backend,
)
from dilated_core.backends.contract import AttentionInputs, AttentionOptions
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.registry import unregister_backend
from dilated_core.reference import reference_dilated_attention_with_lse
from dilated_core.testing import AWKWARD_CASES, BackendConformance, Case, random_cases
from dilated_kernels.flex import call as flex_call
from dilated_kernels.flex import mask as flex_mask
from dilated_kernels.flex.backend import flex
from hypothesis import HealthCheck, given, settings

EXACT = 1e-10
OPTIONS = AttentionOptions(is_causal=False, scale=0.4)
PATTERN = DilatedPattern([8, 16, 64], [1, 2, 4])


@pytest.fixture(autouse=True, scope="module")
def registered():
    is_registered = "flex" in available_backends()
    if not is_registered:
        register_backend(flex)
    yield
    if not is_registered:
        unregister_backend("flex")


def compare_forward(case, dtype=torch.float64, bound=EXACT):
    q, k, v, _ = (x.detach() for x in case.tensors(dtype=dtype))
    out, lse = dilated_attention_with_lse(q, k, v, case.pattern, **case.options(), backend="flex")
    exact_out, exact_lse = reference_dilated_attention_with_lse(
        q, k, v, case.pattern, **case.options()
    )
    assert out.dtype == dtype
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.double(), exact_out, rtol=bound, atol=bound)
    torch.testing.assert_close(lse.double(), exact_lse, rtol=bound, atol=bound)


@pytest.mark.parametrize(
    "case",
    [
        # Every fifth one is causal and not in turns; sweeps run the others.
        pytest.param(case, id=case.name, marks=[pytest.mark.exhaustive] * (i % 5 > 0))
        for i, case in enumerate(AWKWARD_CASES)
    ],
)
def test_forward_of_awkward_cases(case):
    compare_forward(case)


@settings(deadline=None)
@given(case=random_cases(with_options=True, max_seq_len=40))
def test_forward_of_random_cases(case):
    compare_forward(case)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
def test_forward_in_other_dtypes(dtype, bound):
    # A few roundings of values around 1.
    compare_forward(Case(seq_len=77, pattern=PATTERN), dtype, bound)


def mask_of(block_mask, B, H, M, N):
    if block_mask is None:
        return torch.ones(B, H, M, N, dtype=torch.bool)
    b, h, i, j = torch.meshgrid(*map(torch.arange, (B, H, M, N)), indexing="ij")
    return block_mask.mask_mod(b, h, i, j)


def differentiable_flex(q, k, v, *, score_mod, block_mask, scale, enable_gqa, kernel_options):
    """flex_attention with its lse, as torch.nn.attention.flex_attention documents it."""
    H = q.shape[1]
    assert not kernel_options
    assert enable_gqa == (k.shape[1] != H)
    k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.mT) * scale
    indices = torch.meshgrid(*map(torch.arange, scores.shape), indexing="ij")
    if score_mod is not None:
        scores = score_mod(scores, *indices)
    seen = mask_of(block_mask, *scores.shape)
    scores = scores.masked_fill(~seen, -math.inf)
    empty = ~seen.any(-1, keepdim=True)
    p = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    lse = scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return p @ v, lse


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(flex_call, "_flex_attention", lambda kind, mask: differentiable_flex)
    monkeypatch.setattr(flex_call, "_has_backward", lambda kind: True)


class TestFlexOverAStandIn(BackendConformance):
    backend = "flex"
    dtypes = (torch.float64,)

    @pytest.fixture(autouse=True)
    def over_a_stand_in(self, stand_in):
        pass


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=random_cases(with_options=True))
def test_random_cases(stand_in, case):
    TestFlexOverAStandIn()._compare_with_oracle(case, torch.float64, EXACT)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_strips(stand_in, is_causal, num_kv_heads, masked):
    """Ordinary attention, with an out and lse over more keys than it sees."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, dout, out = (randn(2, 9, 4, 8) for _ in range(3))
    k, v = (randn(2, 9, num_kv_heads, 8) for _ in range(2))
    mask = torch.rand(2, 9, num_kv_heads, generator=generator) < 0.6 if masked else None
    options = OPTIONS._replace(is_causal=is_causal, key_padding_mask=mask)
    eager = EagerBackend()
    got, want = flex.forward(q, k, v, options), eager.forward(q, k, v, options)
    torch.testing.assert_close(got, want)
    lse = want.lse + randn(2, 9, 4).abs()
    lse[0, 3] = lse[want.lse == -math.inf] = math.inf
    got = flex.backward(dout, q, k, v, out, lse, options)
    torch.testing.assert_close(got, eager.backward(dout, q, k, v, out, lse, options))


def test_strips_forward_by_pytorch_itself():
    q, k, v = (torch.randn(2, 9, 4, 8, dtype=torch.float64) for _ in range(3))
    for is_causal in (False, True):
        for mask in (None, torch.rand(2, 9, 4) < 0.6):
            options = OPTIONS._replace(is_causal=is_causal, key_padding_mask=mask)
            got = flex.forward(q, k, v, options)
            torch.testing.assert_close(got, EagerBackend().forward(q, k, v, options))


@pytest.mark.parametrize("as_strip", [False, True])
def test_no_backward_on_cpu(as_strip):
    q, k, v, dout = Case(seq_len=16, pattern=PATTERN).tensors(dtype=torch.float32)
    options = OPTIONS
    out = dilated_attention(q, k, v, PATTERN, backend="flex")
    calls = {
        True: lambda: flex.backward(dout, q, k, v, dout, dout[..., 0], options),
        False: lambda: torch.autograd.grad(out, q, dout),
    }
    with pytest.raises(NotImplementedError, match="use backend='sdpa'"):
        calls[as_strip]()


def test_forward_of_tensors_that_want_gradients():
    q, k, v, _ = Case(seq_len=16, pattern=PATTERN).tensors(dtype=torch.float64)
    out = dilated_attention(q, k, v, PATTERN, backend="flex")
    assert out.requires_grad


def test_dropout_is_refused():
    x = torch.zeros(1, 4, 2, 8)
    options = OPTIONS._replace(dropout_p=0.5)
    for call in (
        lambda: flex.forward(x, x, x, options),
        lambda: flex.backward(x, x, x, x, x, x[..., 0], options),
        lambda: flex.dilated_forward(x, x, x, PATTERN, options, cu_seqlens=None),
    ):
        with pytest.raises(ValueError, match=r"dropout_p is 0\.5"):
            call()
    with pytest.raises(ValueError, match=r"dropout_p is 0\.5"):
        dilated_attention(x, x, x, PATTERN, dropout_p=0.5, backend="flex")


def test_documents_are_checked():
    x = torch.zeros(10, 2, 8)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens ends at 9"):
        dilated_attention(x, x, x, PATTERN, cu_seqlens=cu_seqlens, backend="flex")


def test_huge_numbers_in_a_pattern():
    pattern = DilatedPattern([2**40, 2**35, 6], [2**33, 3, 2**50])
    compare_forward(Case(seq_len=20, num_heads=5, pattern=pattern))
    blocked = DilatedPattern([2**40, 6], [2**33, 4], head_offsets="blocked", padding="masked")
    compare_forward(Case(seq_len=20, num_heads=5, pattern=blocked))
    beyond = DilatedPattern([2**63, 2**70, 6], [2**63 - 1, 3, 2**64])
    compare_forward(Case(seq_len=20, num_heads=5, pattern=beyond))


def test_no_number_exceeds_the_indices():
    pattern = DilatedPattern([2**40, 6, 6], [3, 2**50, 2])
    assert flex_mask._clipped(pattern, 20, 5) == [(20, 3), (6, 20), (6, 2)]
    assert flex_mask._clipped(pattern, 4, 50) == [(4, 3), (4, 50), (4, 2)]


def test_first_use_from_eight_threads():
    """Each result is that of a single thread, and the filters of warnings are as before."""
    tensors = torch.randn(8, 1, 20, 2, 8).unbind()

    def attend(x):
        return dilated_attention(x, x, x, DilatedPattern([7, 20], [1, 2]), backend="flex")

    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(attend, tensors))
    assert warnings.filters == before
    assert all(map(torch.equal, together, map(attend, tensors)))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_only_floating_dtypes(dtype):
    x = torch.zeros(1, 8, 2, 8, dtype=dtype)
    (reason,) = flex.why_not(AttentionInputs(x.device, dtype, 2, 8))
    assert reason.startswith(f"the dtype is {str(dtype)[6:]}; it takes float64, ")


@pytest.mark.parametrize("documents", [(20, 1, 7), (3, 40), (28,), (3, 0, 7), (0, 0, 9, 0)])
def test_zero_keys_of_documents(stand_in, documents):
    pattern = DilatedPattern([8, 32], [3, 4], padding="attended")
    case = Case(seq_len=sum(documents), documents=documents, num_heads=5, pattern=pattern)
    TestFlexOverAStandIn()._compare_with_oracle(case, torch.float64, EXACT)


@pytest.mark.parametrize("masked", [False, True])
def test_blocks_are_those_in_which_a_key_is_seen(masked):
    """On CPU PyTorch ignores them; on a GPU nothing else is computed."""
    pattern = DilatedPattern([300, 5], [127, 90])
    x = torch.zeros(2, 300, 4, 8)
    hidden = torch.zeros(2, 300, dtype=torch.bool)
    hidden[1, 128:256] = True
    mask = flex_mask.pattern_mask(
        pattern, x, is_causal=True, documents=None, key_padding_mask=hidden if masked else None
    )
    seen = pattern.materialize(300, 4, is_causal=True) > 0
    seen = seen.expand(2, -1, -1, -1) & ~(hidden[:, None, None] & masked)
    padded = torch.nn.functional.pad(seen, (0, 84, 0, 84)).view(2, 4, 3, 128, 3, 128)
    blocks = mask.block_mask.to_dense() > 0
    assert torch.equal(blocks.expand(2, 4, -1, -1), padded.any(-1).any(3))
    heads_differ = padded.any(-1).any(3)[:, :1] != padded.any(-1).any(3)
    assert heads_differ.any()


def test_one_mask_for_one_pattern_and_size():
    flex_mask._plain_pattern_mask.cache_clear()
    x = torch.zeros(2, 32, 4, 8)
    plain = {"is_causal": False, "documents": None, "key_padding_mask": None}
    first = flex_mask.pattern_mask(PATTERN, x, **plain)
    assert flex_mask.pattern_mask(PATTERN, x[:1].double(), **plain) is first
    others = [
        flex_mask.pattern_mask(PATTERN, x, **{**plain, "is_causal": True}),
        flex_mask.pattern_mask(PATTERN, x[:, 1:], **plain),
        flex_mask.pattern_mask(PATTERN, x[:, :, 1:], **plain),
        flex_mask.pattern_mask(replace(PATTERN, head_offsets="blocked"), x, **plain),
    ]
    assert all(other is not first for other in others)
    assert flex_mask._plain_pattern_mask.cache_info().currsize == 5
    # What depends on the contents of a tensor is made anew.
    hidden = torch.zeros(2, 32, dtype=torch.bool)
    flex_mask.pattern_mask(PATTERN, x, **{**plain, "key_padding_mask": hidden})
    assert flex_mask._plain_pattern_mask.cache_info().currsize == 5
    assert flex_mask._plain_pattern_mask.cache_info().maxsize == 64


def test_a_pattern_of_one_branch_changes_no_score():
    x = torch.zeros(1, 32, 4, 8)
    plain = {"is_causal": False, "documents": None, "key_padding_mask": None}
    assert flex_mask.pattern_mask(DilatedPattern([8], [2]), x, **plain).score_mod is None
    assert flex_mask.pattern_mask(PATTERN, x, **plain).score_mod is not None


def test_nobody_is_warned_about_the_cpu():
    pytorch = importlib.import_module("torch.nn.attention.flex_attention")
    pytorch._WARNINGS_SHOWN.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare_forward(Case(seq_len=19, pattern=DilatedPattern([7], [2])))


def test_the_compiler_takes_it_whole(monkeypatch):
    """The path of a GPU up to code generation, which for CPU has no lse.

    More patterns than the compiler keeps kernels for by itself: past that it would give up, too.
    """
    compiled = torch.compile(flex_call._flex_with_lse, fullgraph=True, backend="eager")
    monkeypatch.setattr(flex_call, "_compiled", lambda is_dynamic: compiled)
    monkeypatch.setattr(
        flex_call, "_flex_attention", lambda kind, mask: flex_call._flex_of_one_size
    )
    names = ("grouped queries", "masked, grouped queries, attended, causal", "packed, causal")
    for case in AWKWARD_CASES:
        if case.name in names:
            compare_forward(case)
    for r in range(1, 10):
        compare_forward(Case(seq_len=30, pattern=DilatedPattern([12] * r, range(1, r + 1))))
