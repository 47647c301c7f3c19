"""Each step is the row of the oracle, in memory and time that do not grow with the context."""

import copy
import io
import math
import pickle

import pytest
import torch
from dilated_core import (
    DecodingCache,
    DilatedPattern,
    decode_step,
    decode_step_with_lse,
    reference_dilated_attention_with_lse,
)
from dilated_core.decoding.size import decoding_cache_nbytes, decoding_cache_rows
from dilated_core.pattern.visible import visible_keys
from dilated_core.testing import AWKWARD_CASES, random_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])
CAUSAL_CASES = [
    case for case in AWKWARD_CASES if case.is_causal and not case.documents and case.masked is None
]


def cache_for(case, dtype=torch.float64, **options):
    return DecodingCache(
        case.pattern,
        batch_size=case.batch_size,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=dtype,
        **options,
    )


def small_cache(**options):
    arguments = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6} | options
    return DecodingCache(arguments.pop("pattern", PATTERN), **arguments)


def random_tokens(n, *, batch_size=2, num_heads=4, num_kv_heads=2, head_dim=6):
    return tuple(
        torch.randn(batch_size, n, heads, head_dim)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )


def decode(q, k, v, cache, *, scale=None):
    """All tokens one by one, as `(out, lse)` of all."""
    steps = [
        decode_step_with_lse(q[:, [t]], k[:, [t]], v[:, [t]], cache, scale=scale)
        for t in range(q.shape[1])
    ]
    return tuple(torch.cat(parts, 1) for parts in zip(*steps, strict=True))


def check_steps(case, cache, prefills):
    """Decode the case, with `prefills[i]` tokens appended at once before the i-th single step."""
    q, k, v, _ = (x.detach() for x in case.tensors(dtype=torch.float64))
    want = reference_dilated_attention_with_lse(
        q, k, v, case.pattern, is_causal=True, scale=case.scale
    )
    nbytes = cache.nbytes
    t, prefills = 0, list(prefills)
    while t < case.seq_len:
        if prefills:
            n = min(prefills.pop(0), case.seq_len - t)
            cache.prefill(k[:, t : t + n], v[:, t : t + n])
            t += n
        assert cache.position == t
        if t < case.seq_len:
            now = slice(t, t + 1)
            got = decode_step_with_lse(q[:, now], k[:, now], v[:, now], cache, scale=case.scale)
            torch.testing.assert_close(got.out, want.out[:, now], rtol=0, atol=1e-12)
            torch.testing.assert_close(got.lse, want.lse[:, now], rtol=0, atol=1e-12)
            t += 1
    assert cache.nbytes == nbytes


@pytest.mark.parametrize("case", CAUSAL_CASES, ids=lambda case: case.name)
def test_steps_are_the_rows_of_the_oracle(case):
    check_steps(case, cache_for(case), [])


@settings(max_examples=150, deadline=None)
@given(random_cases(max_seq_len=40), st.lists(st.integers(0, 30), max_size=5), st.booleans())
def test_any_pattern_with_any_prefills(case, prefills, is_length_known):
    max_seq_len = case.seq_len if is_length_known else None
    check_steps(case, cache_for(case, max_seq_len=max_seq_len), prefills)


def test_a_step_reads_what_a_causal_query_sees_and_no_more():
    """NaN in every row of the cache that no visible key lies in changes nothing."""
    q, k, v = random_tokens(100)
    cache = small_cache()
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    out, _ = decode(q, k, v, cache)
    assert out.isfinite().all()


class LargestResult(TorchDispatchMode):
    """Notes the most elements that the memory behind an operator's result holds."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            held = result.untyped_storage().nbytes() // result.itemsize
            self.elements = max(self.elements, held)
        return result


def test_cost_does_not_grow_with_the_context():
    """A prompt of a billion tokens in the memory of one; the steps after it cost as early ones."""
    early, late = small_cache(), small_cache()
    period = 120  # of the segments of all branches
    token = torch.randn(2, 1, 2, 6)
    early.prefill(*(token.expand(2, 10**9 % period + period, 2, 6) for _ in range(2)))
    with LargestResult() as mode:
        late.prefill(*(token.expand(2, 10**9, 2, 6) for _ in range(2)))
    assert mode.elements == late.keys.numel()
    assert late.position == 10**9
    assert late.nbytes == early.nbytes
    q, k, v = random_tokens(2 * period)
    for t in range(2 * period):
        results, elements = [], []
        for cache in (early, late):
            with LargestResult() as mode:
                results.append(decode_step(q[:, [t]], k[:, [t]], v[:, [t]], cache))
            elements.append(mode.elements)
        assert torch.equal(*results)
        assert elements[0] == elements[1] == late.keys.numel()


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(8, 8), (8, 2), (12, 3), (7, 1)])
def test_memory_is_what_the_heads_need(head_offsets, num_heads, num_kv_heads):
    """Per head of k and v: the distinct positions that its heads of q keep of a segment."""
    pattern = DilatedPattern([10, 36, 3], [1, 5, 7], head_offsets=head_offsets)
    group = num_heads // num_kv_heads
    rows = 0
    for (w, _), branch in zip(pattern.branches, range(3), strict=True):
        for kv_head in range(num_kv_heads):
            kept = {
                position
                for head in range(kv_head * group, (kv_head + 1) * group)
                for t in range(w)
                for position in visible_keys(
                    pattern, t, head, num_heads=num_heads, seq_len=36
                ).positions[branch]
                if position < w
            }
            rows += len(kept)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    assert decoding_cache_rows(pattern, **heads) == rows
    sizes = {"batch_size": 3, "head_dim": 5, "dtype": torch.bfloat16, **heads}
    cache = DecodingCache(pattern, **sizes)
    assert cache.nbytes == decoding_cache_nbytes(pattern, **sizes) == 2 * 3 * rows * 5 * 2
    assert cache.keys.shape == cache.values.shape == (3, rows, 5)


def test_a_known_length_bounds_the_memory():
    pattern = DilatedPattern([2048, 2**20], [1, 16])
    assert decoding_cache_rows(pattern, num_heads=16) == 16 * (2048 + 2**16)
    assert decoding_cache_rows(pattern, num_heads=16, max_seq_len=100) == 16 * 100 + 16 * 6 + 4
    cache = small_cache(max_seq_len=10)
    q, k, v = random_tokens(8)
    cache.prefill(k, v)
    decode(q[:, :2], k[:, :2], v[:, :2], cache)
    before = cache.state_dict()
    with pytest.raises(ValueError, match="has seen 10 tokens and 1 more are given; max_seq_len"):
        decode_step(q[:, :1], k[:, :1], v[:, :1], cache)
    with pytest.raises(ValueError, match="8 more are given"):
        cache.prefill(k, v)
    assert all(torch.equal(before[name], x) for name, x in cache.state_dict().items())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype, autocast):
    case = next(case for case in CAUSAL_CASES if case.name == "grouped queries, causal")
    tensors = [x.detach() for x in case.tensors(dtype=dtype)[:3]]
    exact = reference_dilated_attention_with_lse(*tensors, case.pattern, is_causal=True)
    cache = cache_for(case, dtype)
    q, k, v = (x.split(1, dim=1) for x in tensors)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        steps = [decode_step_with_lse(*step, cache) for step in zip(q, k, v, strict=True)]
    out, lse = (torch.cat(parts, 1) for parts in zip(*steps, strict=True))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, exact.lse.float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(out, exact.out.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_beams_go_on_from_the_rows_they_were_given():
    q, k, v = random_tokens(60)
    cache = small_cache()
    cache.prefill(k[:, :50], v[:, :50])
    beams = [1, 0, 1]
    cache.reorder(torch.tensor(beams, dtype=torch.int32))
    assert cache.batch_size == 3
    got, _ = decode(*(x[beams, 50:] for x in (q, k, v)), cache)
    whole = small_cache()
    want, _ = decode(q, k, v, whole)
    torch.testing.assert_close(got, want[beams, 50:], rtol=0, atol=1e-6)


def through_state_dict(cache):
    file = io.BytesIO()
    torch.save(cache.state_dict(), file)
    file.seek(0)
    other = small_cache()
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), through_state_dict],
    ids=["copy", "deepcopy", "pickle", "state_dict"],
)
def test_a_copy_goes_on_by_itself(duplicate):
    q, k, v = random_tokens(60)
    cache = small_cache()
    cache.prefill(k[:, :30], v[:, :30])
    other = duplicate(cache)
    decode(*(torch.randn_like(x) for x in (q, k, v)), cache)
    assert other.position == 30
    got, _ = decode(q[:, 30:], k[:, 30:], v[:, 30:], other)
    want, _ = decode(q, k, v, small_cache())
    torch.testing.assert_close(got, want[:, 30:], rtol=0, atol=1e-6)


def test_a_state_is_not_changed_by_later_steps():
    cache = small_cache()
    state = cache.state_dict()
    decode(*random_tokens(3), cache)
    assert (state["keys"] == 0).all()
    assert (state["values"] == 0).all()
    assert state["positions"].tolist() == [0, 0]
    assert not torch.equal(cache.keys, state["keys"])


def test_reset_forgets_everything():
    q, k, v = random_tokens(50)
    cache = small_cache()
    first, _ = decode(q, k, v, cache)
    cache.reset()
    assert cache.position == 0
    again, _ = decode(q, k, v, cache)
    assert torch.equal(first, again)


def test_inference_mode_and_no_grad_mix():
    q, k, v = random_tokens(4)
    with torch.inference_mode():
        cache = small_cache()
        decode_step(q[:, :1], k[:, :1], v[:, :1], cache)
    decode_step(q[:, 1:2], k[:, 1:2], v[:, 1:2], cache)
    with torch.inference_mode():
        cache.reorder([0, 1])
    decode_step(q[:, 2:3], k[:, 2:3], v[:, 2:3], cache)
    with torch.no_grad():
        needs_grad = [x[:, 3:].clone().requires_grad_() for x in (q, k, v)]
        out = decode_step(*needs_grad, cache)
    want, _ = decode(q, k, v, small_cache())
    torch.testing.assert_close(out, want[:, 3:], rtol=0, atol=1e-6)
    assert not cache.keys.requires_grad


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_gradients_are_refused_not_dropped(name):
    tensors = dict(zip("qkv", random_tokens(1), strict=True))
    tensors[name].requires_grad_()
    cache = small_cache()
    with pytest.raises(ValueError, match=f"{name} requires a gradient.*no_grad"):
        decode_step(**tensors, cache=cache)
    if name != "q":
        with pytest.raises(ValueError, match=f"{name} requires a gradient"):
            cache.prefill(tensors["k"], tensors["v"])
    assert cache.position == 0


Q, K, _ = random_tokens(1)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "cache is a NoneType", {"cache": None}),
        (TypeError, "q is a list", {"q": [1]}),
        (ValueError, r"q has shape \(2, 4, 6\); it must be \(2, 1, 4, 6\)", {"q": Q[:, 0]}),
        (ValueError, r"q has shape \(2, 2, 4, 6\)", {"q": Q.expand(2, 2, 4, 6)}),
        (ValueError, r"k has shape \(2, 1, 4, 6\); it must be \(2, 1, 2, 6\)", {"k": Q}),
        (ValueError, "v has shape", {"v": K[:1]}),
        (ValueError, "v has shape", {"v": K[..., :5]}),
        (TypeError, "k has dtype torch.float16 and the cache torch.float32", {"k": K.half()}),
        (ValueError, "v is on meta and the cache on cpu", {"v": K.to("meta")}),
        (TypeError, "scale is 'x'", {"scale": "x"}),
        (ValueError, "scale is nan", {"scale": math.nan}),
    ],
)
def test_errors_of_a_step_leave_the_cache_alone(error, message, changes):
    cache = small_cache()
    cache.prefill(K, K)
    before = cache.state_dict()
    with pytest.raises(error, match=message):
        decode_step(**({"q": Q, "k": K, "v": K, "cache": cache} | changes))
    assert all(torch.equal(before[name], x) for name, x in cache.state_dict().items())


@pytest.mark.parametrize(
    ("error", "message", "k", "v"),
    [
        (TypeError, "k is a list", [1], K),
        (TypeError, "v is a NoneType", K, None),
        (ValueError, r"k has shape \(2, 2, 6\)", K[:, 0], K),
        (ValueError, "v has shape", K.expand(2, 3, 2, 6), K),
        (TypeError, "v has dtype torch.float64", K, K.double()),
    ],
)
def test_errors_of_a_prefill(error, message, k, v):
    with pytest.raises(error, match=message):
        small_cache().prefill(k, v)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "pattern is a str", {"pattern": "x"}),
        (TypeError, "num_heads is 4.0", {"num_heads": 4.0}),
        (ValueError, "num_heads is 0; it must be at least 1", {"num_heads": 0}),
        (ValueError, "num_heads is 4 and num_kv_heads 3; num_kv_heads must", {"num_kv_heads": 3}),
        (ValueError, "batch_size is -1", {"batch_size": -1}),
        (ValueError, "head_dim is 0", {"head_dim": 0}),
        (TypeError, "max_seq_len is True", {"max_seq_len": True}),
        (ValueError, "max_seq_len is 0", {"max_seq_len": 0}),
        (TypeError, "dtype is torch.int32; it must be a floating", {"dtype": torch.int32}),
    ],
)
def test_errors_of_a_cache(error, message, changes):
    with pytest.raises(error, match=message):
        small_cache(**changes)
    sizes = {"pattern": PATTERN, "batch_size": 2, "num_heads": 4, "head_dim": 6}
    with pytest.raises(error, match=message):
        decoding_cache_nbytes(**(sizes | {"dtype": torch.float32} | changes))


@pytest.mark.parametrize(
    ("error", "message", "indices"),
    [
        (TypeError, "batch_indices has dtype torch.float32", torch.zeros(2)),
        (TypeError, "an entry of batch_indices is True; it must be an integer", [1, True]),
        (TypeError, "batch_indices has dtype torch.bool", torch.tensor([True, False])),
        (TypeError, "batch_indices is a int; it must be a tensor or a list", 1),
        (TypeError, "batch_indices is a dict; it must be a tensor or a list", {0: 1}),
        (TypeError, "batch_indices is a set; it must be a tensor or a list", {0, 1}),
        (ValueError, r"batch_indices has shape \(\)", torch.tensor(1)),
        (ValueError, r"batch_indices holds -1; each must be in \[0, B\), here B = 2", [0, -1]),
        (ValueError, "batch_indices holds 2", torch.tensor([2, 0])),
    ],
)
def test_errors_of_reorder(error, message, indices):
    with pytest.raises(error, match=message):
        small_cache().reorder(indices)


@pytest.mark.parametrize("batch_size", [0, 1])
def test_an_empty_batch_is_decoded_too(batch_size):
    q, k, v = random_tokens(9, batch_size=batch_size)
    out, lse = decode(q, k, v, small_cache(batch_size=batch_size))
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
