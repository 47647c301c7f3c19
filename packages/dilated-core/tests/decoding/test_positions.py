"""Each sequence of a batch is at its own position: every result is that of the sequence alone."""

import math
from itertools import pairwise

import pytest
import torch
from dilated_core import (
    DecodingCache,
    DilatedPattern,
    decode_step,
    decode_step_with_lse,
    decode_tokens,
    dilated_attention,
    register_backend,
    unregister_backend,
)
from dilated_core import reference_dilated_attention_with_lse as reference
from dilated_core.backends.eager import EagerBackend
from dilated_core.testing import random_cases
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])


def sequences(case, num_sequences, seed=0):
    """q, k, v of so many sequences, and what the oracle gives for each of them alone."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(
            num_sequences, case.seq_len, heads, case.head_dim, dtype=torch.float64,
            generator=generator,
        )
        for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)
    )  # fmt: skip
    want = reference(q, k, v, case.pattern, is_causal=True, scale=case.scale)
    return (q, k, v), want


def cache_for(case, batch_size, **options):
    return DecodingCache(
        case.pattern,
        batch_size=batch_size,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        dtype=torch.float64,
        **options,
    )


def next_tokens(x, positions, n):
    """The tokens of each sequence behind its position; NaN where there are none, as in padding."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n), value=math.nan)
    return torch.stack([row[p : p + n] for row, p in zip(padded, positions, strict=True)])


@settings(max_examples=150, deadline=None)
@given(
    random_cases(max_seq_len=40),
    st.integers(1, 4).flatmap(
        lambda num: st.lists(
            st.one_of(
                st.just("step"),
                st.tuples(
                    st.sampled_from(["prefill", "tokens"]),
                    st.lists(st.integers(0, 25), min_size=num, max_size=num),
                ),
                st.permutations(range(num)),
            ),
            min_size=1,
            max_size=6,
        ).map(lambda calls: (num, calls))
    ),
    st.booleans(),
)
def test_any_calls_at_any_positions(case, drawn, is_length_known):
    """Steps, prompts of any lengths and new orders of the batch, in any order."""
    num, calls = drawn
    tensors, want = sequences(case, num)
    cache = cache_for(case, num, max_seq_len=case.seq_len if is_length_known else None)
    order = list(range(num))
    for call in [*calls, "step"]:
        positions = list(cache.positions)
        if call == "step":
            if max(positions) == case.seq_len:
                continue
            now = [next_tokens(x[order], positions, 1) for x in tensors]
            got = decode_step_with_lse(*now, cache, scale=case.scale)
            counts = [1] * num
            for name in ("out", "lse"):
                exact = torch.stack(
                    [getattr(want, name)[i, [p]] for i, p in zip(order, positions, strict=True)]
                )
                torch.testing.assert_close(getattr(got, name), exact, rtol=0, atol=1e-12)
        elif isinstance(call, list):
            cache.reorder(call)
            order, positions = [order[i] for i in call], [positions[i] for i in call]
            counts = [0] * num
        else:
            kind, lengths = call
            counts = [min(n, case.seq_len - p) for n, p in zip(lengths, positions, strict=True)]
            n = max(counts)
            q, k, v = (next_tokens(x[order], positions, n) for x in tensors)
            if kind == "prefill":
                cache.prefill(k, v, lengths=torch.tensor(counts))
            else:
                got = decode_tokens(q, k, v, cache, lengths=counts, scale=case.scale)
                for row, i in enumerate(order):
                    p, count = positions[row], counts[row]
                    exact = want.out[i, p : p + count]
                    torch.testing.assert_close(got[row, :count], exact, rtol=0, atol=1e-12)
                    assert (got[row, count:] == 0).all()
        assert cache.positions == tuple(p + n for p, n in zip(positions, counts, strict=True))


def small_cache(**options):
    sizes = {"batch_size": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
    return DecodingCache(PATTERN, **(sizes | options))


def tokens(n, batch_size=3):
    return [torch.randn(batch_size, n, heads, 6) for heads in (4, 2, 2)]


def test_equal_positions_are_one_number():
    cache = small_cache()
    _, k, v = tokens(9)
    cache.prefill(k, v)
    assert cache.position == 9
    assert cache.positions == (9, 9, 9)
    cache.prefill(k, v, lengths=[0, 9, 2])
    assert cache.positions == (9, 18, 11)
    with pytest.raises(ValueError, match=r"at the positions \(9, 18, 11\), so they have no common"):
        _ = cache.position
    cache.reset()
    assert cache.positions == (0, 0, 0)
    cache.reorder([])
    assert cache.positions == ()
    assert cache.position == 0


class Counting(EagerBackend):
    """Notes the batch size and position of each call."""

    name = "counting"

    def __init__(self):
        self.calls = []

    def decode_forward(self, q, *rest, position, scale):
        self.calls.append((len(q), position))
        assert rest[2].is_contiguous()
        return super().decode_forward(q, *rest, position=position, scale=scale)


def test_a_backend_gets_one_position_at_a_time():
    backend = Counting()
    register_backend(backend)
    try:
        cache = small_cache(batch_size=5)
        q, k, v = tokens(7, batch_size=5)
        cache.prefill(k, v, lengths=[7, 2, 2, 2, 7])
        decode_step(q[:, :1], k[:, :1], v[:, :1], cache, backend="counting")
        assert backend.calls == [(1, 7), (3, 2), (1, 7)]
    finally:
        unregister_backend("counting")


@pytest.mark.parametrize(
    ("error", "message", "lengths"),
    [
        (ValueError, "an entry of lengths is 6; it must be at most 5", [1, 6, 0]),
        (ValueError, "an entry of lengths is -1; it must be at least 0", [1, -1, 0]),
        (TypeError, "an entry of lengths is 1.5; it must be an integer", [1, 1.5, 0]),
        (ValueError, "lengths has 2 entries; .* here 3", [1, 2]),
        (TypeError, "lengths is a int; it must be a tensor or a list of integers", 4),
        (ValueError, r"lengths is a tensor of shape \(3, 1\)", torch.ones(3, 1).int()),
        (ValueError, "the cache has seen 28 tokens and 3 more are given; max_seq", [0, 3, 2]),
    ],
)  # fmt: skip
def test_mistakes_leave_the_cache_alone(error, message, lengths):
    cache = small_cache(max_seq_len=30)
    _, k, v = tokens(28)
    cache.prefill(k, v, lengths=[1, 28, 4])
    before = cache.state_dict()
    q, k, v = tokens(5)
    with pytest.raises(error, match=message):
        cache.prefill(k, v, lengths=lengths)
    with pytest.raises(error, match=message):
        decode_tokens(q, k, v, cache, lengths=lengths)
    assert all(torch.equal(before[name], x) for name, x in cache.state_dict().items())


def test_parts_of_a_prompt_are_the_whole_in_half_precision():
    """Partial results are merged in float32: one rounding, whatever the parts are."""
    torch.manual_seed(0)
    tensors = [x.bfloat16() for x in tokens(200)]
    cache = small_cache(dtype=torch.bfloat16)
    bounds = [0, 3, 50, 51, 130, 200]
    got = torch.cat(
        [
            decode_tokens(*(x[:, start:stop] for x in tensors), cache)
            for start, stop in pairwise(bounds)
        ],
        dim=1,
    )
    assert got.dtype == torch.bfloat16
    exact = reference(*tensors, PATTERN, is_causal=True).out
    whole = dilated_attention(*tensors, PATTERN, is_causal=True)
    assert (got - exact).abs().max() <= 2 * (whole - exact).abs().max() + 1e-3


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_a_named_backend_attends_from_a_prompt(backend):
    tensors = tokens(60)
    cache = small_cache()
    cache.prefill(*(x[:, :30] for x in tensors[1:]))
    got = decode_tokens(*(x[:, 30:] for x in tensors), cache, backend=backend)
    want = reference(*(x.double() for x in tensors), PATTERN, is_causal=True).out[:, 30:]
    torch.testing.assert_close(got, want.float(), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="backend is 'elephant'; it must be"):
        decode_tokens(*(x[:, 30:] for x in tensors), cache, backend="elephant")


def test_no_tokens_at_all():
    cache = small_cache()
    assert decode_tokens(*tokens(0), cache).shape == (3, 0, 4, 6)
    cache.prefill(*tokens(0)[1:])
    assert cache.positions == (0, 0, 0)
    empty = small_cache(batch_size=0)
    assert decode_tokens(*tokens(4, batch_size=0), empty).shape == (0, 4, 4, 6)
    assert decode_step(*tokens(1, batch_size=0), empty).shape == (0, 1, 4, 6)
