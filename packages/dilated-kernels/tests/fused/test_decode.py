"""Decoding by kernels: against the oracle step by step, and against what eager leaves in the cache.

In Triton's interpreter, and compiled where there is a GPU.
"""

import math

import pytest
import torch
from dilated_core import (
    DecodingCache,
    DilatedPattern,
    decode_step_with_lse,
    reference_dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.testing import AWKWARD_CASES, random_cases
from dilated_core.testing.error_budget import pytorch_errors, relative_error
from dilated_kernels.fused import TritonBackend, decoding, launch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])
CAUSAL_CASES = [
    case for case in AWKWARD_CASES if case.is_causal and not case.documents and case.masked is None
]
# Rows of a head and scores of a sum, rounded to float32.
FLOAT32 = {"rtol": 1e-6, "atol": 1e-5}


def caches(tensors, pattern, count=2, **options):
    """Equal caches for tensors `(B, S, H, D)`, full of NaN so that no row is read unwritten."""
    q, k, _ = tensors
    B, _, H, D = q.shape
    sizes = {"batch_size": B, "num_heads": H, "num_kv_heads": k.shape[2], "head_dim": D}
    made = []
    for _ in range(count):
        made.append(DecodingCache(pattern, **sizes, device=q.device, dtype=q.dtype, **options))
        made[-1].keys.fill_(math.nan)
        made[-1].values.fill_(math.nan)
    return made


def decode(cache, tensors, start, *, backend="triton-test", scale=None):
    """The tokens before `start` at once, the others one by one: out and lse of those."""
    cache.prefill(*(x[:, :start] for x in tensors[1:]))
    steps = [
        decode_step_with_lse(
            *(x[:, t : t + 1] for x in tensors), cache, scale=scale, backend=backend
        )
        for t in range(start, tensors[0].shape[1])
    ]
    return tuple(torch.cat(parts, 1) for parts in zip(*steps, strict=True))


def check(tensors, pattern, start, *, scale=None, **options):
    """The steps from `start` on are rows of the oracle, and leave the cache as eager does."""
    ours, eagers = caches(tensors, pattern, **options)
    got = decode(ours, tensors, start, scale=scale)
    decode(eagers, tensors, start, backend="eager", scale=scale)
    want = reference_dilated_attention_with_lse(*tensors, pattern, is_causal=True, scale=scale)
    for result, exact in zip(got, want, strict=True):
        torch.testing.assert_close(result, exact[:, start:].float(), **FLOAT32)
    for name in ("keys", "values"):
        torch.testing.assert_close(
            getattr(ours, name), getattr(eagers, name), rtol=0, atol=0, equal_nan=True
        )
    assert ours.position == eagers.position


def random_tokens(n, *, batch_size=1, num_heads=4, num_kv_heads=2, head_dim=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(n)
    return tuple(
        torch.randn(batch_size, n, heads, head_dim, generator=generator).to(DEVICE, dtype)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )


class ShortSplits(TritonBackend):
    """The kernels, with few keys in a split, so that a short context has several."""

    elements = decoding.ELEMENTS_PER_SPLIT

    def decode_forward(self, *tensors, **options):
        return decoding.decode_forward(*tensors, **options, elements_per_split=self.elements)


def test_sequences_at_different_positions():
    """Each run of neighbours at one position is a call of its own, on its part of the cache."""
    tensors = random_tokens(50, batch_size=3)
    _, k, v = tensors
    (cache,) = caches(tensors, PATTERN, count=1)
    lengths = [41, 9, 9]
    cache.prefill(k[:, :41], v[:, :41], lengths=lengths)
    now = [torch.stack([x[i, n : n + 1] for i, n in enumerate(lengths)]) for x in tensors]
    got = decode_step_with_lse(*now, cache, backend="triton-test")
    want = reference_dilated_attention_with_lse(*tensors, PATTERN, is_causal=True)
    for result, exact in zip(got, want, strict=True):
        rows = torch.stack([exact[i, n : n + 1] for i, n in enumerate(lengths)])
        torch.testing.assert_close(result, rows.float(), **FLOAT32)
    assert cache.positions == (42, 10, 10)


@pytest.fixture(autouse=True)
def short_splits():
    """Register the kernels as "triton-test"."""
    backend = ShortSplits(name="triton-test")
    register_backend(backend)
    yield backend
    unregister_backend("triton-test")


@pytest.fixture
def keys_per_split(short_splits):
    """Set how many keys are in a split at least."""

    def set_number(keys, head_dim=6):
        short_splits.elements = keys * (1 << (head_dim - 1).bit_length())

    return set_number


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=[pytest.mark.exhaustive] * (i % 2))
        for i, case in enumerate(CAUSAL_CASES)
    ],
)
def test_last_steps_are_rows_of_the_oracle(case):
    tensors = [x.detach() for x in case.tensors(dtype=torch.float32, device=DEVICE)[:3]]
    check(tensors, case.pattern, max(0, case.seq_len - 3), scale=case.scale)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=random_cases(max_seq_len=60),
    last=st.integers(1, 6),
    keys=st.sampled_from([1, 3, 16, 256]),
    is_length_known=st.booleans(),
)
def test_any_pattern_after_any_prefill_in_any_splits(
    keys_per_split, case, last, keys, is_length_known
):
    keys_per_split(keys, case.head_dim)
    tensors = [x.detach() for x in case.tensors(dtype=torch.float32, device=DEVICE)[:3]]
    max_seq_len = case.seq_len if is_length_known else None
    start = max(0, case.seq_len - last)
    check(tensors, case.pattern, start, scale=case.scale, max_seq_len=max_seq_len)


@pytest.mark.parametrize(
    ("head_offsets", "num_heads", "num_kv_heads"),
    [("blocked", 3, 3), ("interleaved", 6, 2), ("interleaved", 20, 1), ("blocked", 36, 2)],
)
def test_all_steps_of_a_short_context(head_offsets, num_heads, num_kv_heads, keys_per_split):
    """From the first token on, over the ends of segments; more than 16 heads take two programs."""
    keys_per_split(5)
    pattern = DilatedPattern([4, 12, 15], [1, 3, 5], head_offsets=head_offsets)
    check(random_tokens(14, num_heads=num_heads, num_kv_heads=num_kv_heads), pattern, 0)


@pytest.mark.parametrize(
    ("dtype", "num_kv_heads", "head_dim"),
    [
        (torch.float32, 4, 96),
        (torch.float32, 1, 48),
        (torch.float16, 4, 256),
        (torch.bfloat16, 4, 48),
        (torch.bfloat16, 1, 256),
    ],
)
def test_errors_are_those_of_pytorch(dtype, num_kv_heads, head_dim, keys_per_split):
    """And lse is computed in float32 whatever the dtype."""
    keys_per_split(64, head_dim)
    pattern = DilatedPattern([64, 128], [1, 2])
    tensors = random_tokens(126, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    (cache,) = caches(tensors, pattern, 1)
    out, lse = decode(cache, tensors, 123)
    want = reference_dilated_attention_with_lse(*tensors, pattern, is_causal=True)
    q, k, v = (x.repeat_interleave(4 // x.shape[2], 2) for x in tensors)
    budget, *_ = pytorch_errors(q, k, v, torch.ones_like(q), is_causal=True)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert relative_error(out, want.out[:, 123:]) <= 2 * budget + torch.finfo(dtype).eps
    torch.testing.assert_close(lse, want.lse[:, 123:].float(), rtol=1e-6, atol=1e-5)


def test_a_branch_given_twice_counts_twice_in_any_split(keys_per_split):
    keys_per_split(4)
    check(random_tokens(12), DilatedPattern([8, 8, 12], [1, 1, 2]), 9)


def test_rows_that_no_branch_keeps_are_empty(keys_per_split):
    pattern = DilatedPattern([6, 12], [4, 6])
    tensors = random_tokens(12)
    for keys in (256, 1):
        keys_per_split(keys)
        (cache,) = caches(tensors, pattern, 1)
        out, lse = decode(cache, tensors, 0)
        counts = pattern.materialize(12, 4, is_causal=True).sum(2)
        is_empty = (counts == 0).T[None].to(DEVICE)
        assert is_empty.any()
        assert (out[is_empty] == 0).all()
        assert (lse[is_empty] == -math.inf).all()
        assert lse[~is_empty].isfinite().all()


def test_beams_go_on_from_the_rows_they_were_given():
    tensors = random_tokens(30, batch_size=2)
    beams = [1, 0, 1]
    (cache,) = caches(tensors, PATTERN, 1)
    cache.prefill(*(x[:, :26] for x in tensors[1:]))
    cache.reorder(beams)
    steps = [
        decode_step_with_lse(
            *(x[beams, t : t + 1] for x in tensors), cache, backend="triton-test"
        ).out
        for t in range(26, 30)
    ]
    want = reference_dilated_attention_with_lse(*tensors, PATTERN, is_causal=True).out
    torch.testing.assert_close(torch.cat(steps, 1), want[beams, 26:].float(), **FLOAT32)


@pytest.mark.parametrize("kind", ["slices", "slices of the last dimension", "heads first"])
def test_inputs_may_be_strided(kind):
    tensors = random_tokens(20, batch_size=2, num_kv_heads=4)
    if kind == "heads first":
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    else:
        dim = 2 if kind == "slices" else -1
        strided = torch.stack(tensors, dim).unbind(dim)
    (cache,) = caches(tensors, PATTERN, 1)
    out, _ = decode(cache, strided, 17)
    want = reference_dilated_attention_with_lse(*tensors, PATTERN, is_causal=True).out
    torch.testing.assert_close(out, want[:, 17:].float(), **FLOAT32)


def test_very_negative_and_very_large_scores():
    q, k, v = random_tokens(20)
    for factor in (-3e4, 3e4):
        check((q, k * 0 + q[:, :, :1].sign() * factor, v), PATTERN, 17, scale=1e-2)


def test_results_are_the_same_bits_again_and_in_any_batch(keys_per_split):
    keys_per_split(4)
    tensors = random_tokens(22, batch_size=3)
    first, again, alone = caches(tensors, PATTERN, 2) + caches([x[2:] for x in tensors], PATTERN, 1)
    want = decode(first, tensors, 19)
    for ours, theirs in zip(want, decode(again, tensors, 19), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(want, decode(alone, [x[2:] for x in tensors], 19), strict=True):
        assert torch.equal(ours[2:], theirs)


def test_an_empty_batch_is_decoded_too():
    tensors = random_tokens(3, batch_size=0)
    (cache,) = caches(tensors, PATTERN, 1)
    out, lse = decode(cache, tensors, 0)
    assert out.shape == tensors[0].shape
    assert lse.shape == tensors[0].shape[:3]


@pytest.fixture
def grids(monkeypatch):
    """Grids of the launches, as they run."""
    seen = []

    def run(launches, device):
        launches = list(launches)
        seen.extend(launch.grid for launch in launches)
        launch.run(launches, device)

    monkeypatch.setattr(decoding, "run", run)
    return seen


def test_one_launch_for_few_keys_and_two_for_many(grids, keys_per_split):
    tensors = random_tokens(24, batch_size=2)
    (cache,) = caches(tensors, PATTERN, 1)
    decode(cache, tensors, 23)
    assert grids == [(2 * 2,)]
    grids.clear()
    keys_per_split(4)
    cache.reset()
    decode(cache, tensors, 23)
    # Position 23 has 7 rows of the first branch before it, 7 of the second and 5 of the third.
    assert grids == [(2 * 2 * 5,), (2 * 4,)]


def test_auto_takes_the_kernel_on_a_gpu_and_never_the_interpreter(grids):
    tensors = random_tokens(3)
    (cache,) = caches(tensors, PATTERN, 1)
    decode(cache, tensors, 1, backend="auto")
    assert len(grids) == (2 if DEVICE == "cuda" else 0)
    decode(cache, [x[:, 2:] for x in tensors], 0, backend="triton-test")
    assert grids


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("'triton' cannot run float64 on .*: the dtype is float64", {"dtype": torch.float64}),
        ("'triton' cannot run float32 on .*: head_dim is 257", {"head_dim": 257}),
    ],
)
def test_the_named_kernel_says_what_it_cannot_run(grids, message, changes):
    tensors = random_tokens(2, **changes)
    (cache,) = caches(tensors, PATTERN, 1)
    with pytest.raises(ValueError, match=message):
        decode(cache, tensors, 1, backend="triton")
    assert cache.position == 1
    decode(cache, [x[:, 1:] for x in tensors], 0, backend="auto")
    assert grids == []


@pytest.mark.parametrize("position", [0, 1, 255, 256, 257, 2**20, 2**33 - 1])
@pytest.mark.parametrize("head_dim", [1, 48, 64, 256])
def test_splits_hold_every_key_and_are_no_more_than_can_be_merged(position, head_dim):
    pattern = DilatedPattern([2**9, 2**31], [1, 2])
    layout = decoding.CacheLayout(pattern.branches, [], None, None, None)
    parts, keys = decoding.choose_splits(layout, position, head_dim)
    num_keys = position % 2**9 + position % 2**31 // 2
    assert parts * keys >= num_keys
    assert (parts - 1) * keys < max(num_keys, 1)
    assert 1 <= parts <= decoding.MAX_SPLITS
    assert keys >= 2**14 / (2 * head_dim)


def test_longer_splits_where_there_would_be_too_many(monkeypatch, keys_per_split):
    """As in segments of millions of keys."""
    keys_per_split(1)
    tensors = random_tokens(200, num_heads=1, num_kv_heads=1)
    assert decoding.MAX_SPLITS == 128
    check(tensors, DilatedPattern([200], [1]), 199)


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(120 * (2**31 // 120), id="over 2^31"),
        pytest.param(120 * 2**26, id="beyond", marks=pytest.mark.exhaustive),
    ],
)
def test_positions_beyond_32_bits(start, keys_per_split):
    """Where all segments begin anew, a step is what it is at position 0."""
    keys_per_split(3)
    tensors = random_tokens(14)
    near, far = caches(tensors, PATTERN)
    want = decode(near, tensors, 0)
    assert all(start % w == 0 for w, _ in PATTERN.branches)
    far._positions = [start]
    steps = [
        decode_step_with_lse(*(x[:, t : t + 1] for x in tensors), far, backend="triton-test")
        for t in range(14)
    ]
    for got, expected in zip(zip(*steps, strict=True), want, strict=True):
        assert torch.equal(torch.cat(got, 1), expected)


def test_segments_and_rates_beyond_32_bits():
    check(random_tokens(14), DilatedPattern([8, 2**40, 2**41], [1, 2**33 + 1, 2**34]), 0)


@pytest.mark.parametrize("position", [2**31 - 2, 2**31 - 1, 2**31, 2**33])
@pytest.mark.parametrize("r", [2**31 - 2, 2**31 - 1, 2**31, 2**32])
def test_long_segments_at_positions_that_take_32_bits(position, r):
    """Eager agrees about which rows a late step sees and writes."""
    tensors = random_tokens(1, head_dim=2)
    ours, eagers = caches(tensors, DilatedPattern([2**36], [r]))
    results = []
    for cache, backend in ((ours, "triton"), (eagers, "eager")):
        cache._positions = [position]
        cache.keys.fill_(0.5)
        cache.values.fill_(0.5)
        results.append(decode_step_with_lse(*tensors, cache, backend=backend))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, **FLOAT32)
    assert torch.equal(ours.keys, eagers.keys)


@pytest.mark.gpu
@pytest.mark.large
def test_a_cache_of_more_than_two_to_the_31_elements():
    """Offsets beyond 32 bits: of a batch row, of a head and of a row."""
    w, D = 2**22, 128
    tensors = random_tokens(1, batch_size=5, num_heads=1, num_kv_heads=1, head_dim=D)
    tensors = [x.half() for x in tensors]
    (cache,) = caches(tensors, DilatedPattern([w], [1]), 1)
    assert cache.keys.numel() > 2**31
    cache.keys.zero_()
    cache.values.fill_(1.0)
    cache._positions = [w - 1] * 5
    q, k, v = tensors
    out, lse = decode_step_with_lse(q, k * 0, v, cache, backend="triton-test")
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(w)), rtol=1e-5, atol=0)
    torch.testing.assert_close(out, torch.ones_like(out), rtol=1e-2, atol=0)
    assert torch.equal(cache.values[:, -1], v[:, 0, 0])
