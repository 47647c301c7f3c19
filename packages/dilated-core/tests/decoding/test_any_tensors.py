"""A step is right for any strides, any scale, any autocast and whatever unread rows hold."""

import math

import pytest
import torch
from dilated_core import (
    DecodingCache,
    DilatedPattern,
    decode_step_with_lse,
    decoding_cache_nbytes,
    reference_dilated_attention_with_lse,
)

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])
S, H, H_KV, D = 50, 4, 2, 6


class Index:
    """An integer of another library, as numpy's are."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


def decode(cache, q, k, v, *, start=0, scale=None):
    steps = [
        decode_step_with_lse(*(x[:, t : t + 1] for x in (q, k, v)), cache, scale=scale)
        for t in range(start, q.shape[1])
    ]
    return [torch.cat(parts, 1) for parts in zip(*steps, strict=True)]


def new_cache(q, k, *, pattern=PATTERN, **options):
    sizes = {"batch_size": q.shape[0], "num_heads": q.shape[2], "num_kv_heads": k.shape[2]}
    return DecodingCache(pattern, **sizes, head_dim=q.shape[3], dtype=q.dtype, **options)


def check(q, k, v, *, prefill=0, scale=None, pattern=PATTERN, rows=slice(None)):
    cache = new_cache(q, k, pattern=pattern)
    cache.prefill(k[:, :prefill], v[:, :prefill])
    got = decode(cache, q, k, v, start=prefill, scale=scale)
    want = reference_dilated_attention_with_lse(q, k, v, pattern, is_causal=True, scale=scale)
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours, exact[:, prefill:], rtol=0, atol=1e-12)


def overlapping(heads):
    """Positions that are windows of one row of numbers: they share memory."""
    return torch.randn(2, S + D - 1, heads).double().unfold(1, D, 1)


LAYOUTS = {
    "heads first": lambda h: torch.randn(2, h, S, D).double().transpose(1, 2),
    "reversed dimensions": lambda h: torch.randn(D, h, S, 2).double().permute(3, 2, 1, 0),
    "every third position and number": lambda h: torch.randn(2, 3 * S, h, 3 * D).double()[
        :, ::3, :, ::3
    ],
    "overlapping positions": overlapping,
    "one batch row for all": lambda h: torch.randn(1, S, h, D).double().expand(2, S, h, D),
    "one head for all": lambda h: torch.randn(2, S, 1, D).double().expand(2, S, h, D),
    "one number for all": lambda h: torch.randn(2, S, h, 1).double().expand(2, S, h, D),
    "one token for all": lambda h: torch.randn(2, 1, h, D).double().expand(2, S, h, D),
}


@pytest.mark.parametrize("prefill", [0, 33])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, prefill):
    torch.manual_seed(0)
    check(*(LAYOUTS[layout](heads) for heads in (H, H_KV, H_KV)), prefill=prefill)


def random_tokens(dtype=torch.float64):
    return [torch.randn(2, S, heads, D, dtype=dtype) for heads in (H, H_KV, H_KV)]


def test_keys_may_be_values_and_queries():
    x = torch.randn(2, S, H, D, dtype=torch.float64)
    check(x, x, x, prefill=20)


@pytest.mark.parametrize("scale", [0, 0.0, -0.7, -3, 1e-300, 25.0])
def test_any_finite_scale(scale):
    check(*random_tokens(), scale=scale, prefill=20)


@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_float64_stays_float64_under_autocast(amp):
    q, k, v = random_tokens()
    with torch.autocast("cpu", amp):
        check(q, k, v, prefill=20)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_unread_rows_may_hold_anything(bad):
    """A freed batch row, a reset, and all rows behind the newest of a segment."""
    q, k, v = random_tokens()
    want = decode(new_cache(q, k), q, k, v)
    cache = new_cache(q, k)
    cache.prefill(*(torch.full((2, 45, H_KV, D), bad, dtype=q.dtype) for _ in "kv"))
    cache.reset()
    for ours, exact in zip(decode(cache, q, k, v), want, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-13)

    # Batch row 0 is a freed slot: its own results are lost, and no other batch row's.
    cache = new_cache(q, k)
    k_bad, v_bad = k.clone(), v.clone()
    k_bad[0, :30] = v_bad[0, :30] = bad
    got = decode(cache, q, k_bad, v_bad)
    for ours, exact in zip(got, want, strict=True):
        assert torch.equal(ours[1], exact[1])
    # It starts anew when the row of another sequence takes its place.
    cache.reorder([1, 1])
    for x in cache.state_dict().values():
        assert x.double().isfinite().all()


def test_batch_rows_go_on_as_any_selection():
    q, k, v = random_tokens()
    want, _ = decode(new_cache(q, k), q, k, v)
    for rows in ([0, 0, 1, 1, 0], [], [1], torch.tensor([1, 0], dtype=torch.uint8), (1, 0)):
        chosen = torch.as_tensor(rows, dtype=torch.int64)
        cache = new_cache(q, k)
        cache.prefill(k[:, :30], v[:, :30])
        cache.reorder(rows)
        got, _ = decode(cache, *(x[chosen] for x in (q, k, v)), start=30)
        assert cache.batch_size == len(chosen)
        torch.testing.assert_close(got, want[chosen, 30:], rtol=0, atol=1e-13)
    cache.reorder([])
    with pytest.raises(ValueError, match=r"batch_indices holds 0; .* here B = 0"):
        cache.reorder([0])


def test_integers_of_other_libraries():
    pattern = DilatedPattern([Index(8)], [Index(2)])
    sizes = {"batch_size": Index(2), "num_heads": Index(4), "num_kv_heads": Index(2)}
    cache = DecodingCache(pattern, **sizes, head_dim=Index(6), max_seq_len=Index(9),
                          head_range=(Index(1), Index(8)))  # fmt: skip
    numbers = (cache.num_heads, cache.num_kv_heads, cache.max_seq_len, *cache.head_range)
    assert numbers == (4, 2, 9, 1, 8)
    assert all(type(number) is int for number in numbers)
    nbytes = decoding_cache_nbytes(pattern, **sizes, head_dim=Index(6), dtype=torch.float32)
    assert type(nbytes) is int
    assert nbytes == DecodingCache(pattern, **sizes, head_dim=6).nbytes


@pytest.mark.parametrize("n", [2**63, 2**100])
@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_huge_lengths_and_rates(n, head_offsets):
    tokens = random_tokens()
    pattern, same = (
        DilatedPattern([m, 4, m, m - 1], [1, m, m, 3], head_offsets=head_offsets)
        for m in (n, S + 1)
    )
    for max_seq_len in (S, n):
        limited = pattern if max_seq_len == S else DilatedPattern([4, n], [n, n - 1])
        cache = new_cache(*tokens[:2], pattern=limited, max_seq_len=max_seq_len)
        cache.prefill(*(x[:, :20] for x in tokens[1:]))
        got = decode(cache, *tokens, start=20)
        same = same if max_seq_len == S else DilatedPattern([4, S], [S, S])
        want = reference_dilated_attention_with_lse(*tokens, same, is_causal=True)
        for ours, exact in zip(got, want, strict=True):
            torch.testing.assert_close(ours, exact[:, 20:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("batch_size", [0, 2])
def test_a_cache_that_no_tensor_can_hold(batch_size):
    sizes = {"batch_size": batch_size, "num_heads": 4, "head_dim": 8}
    with pytest.raises(ValueError, match=r"the keys of this cache would take \d{20,} bytes, more "
                       r"than a tensor can have; give max_seq_len"):  # fmt: skip
        DecodingCache(DilatedPattern([2**63], [1]), **sizes)
    DecodingCache(DilatedPattern([2**63], [1]), **sizes, max_seq_len=10)
