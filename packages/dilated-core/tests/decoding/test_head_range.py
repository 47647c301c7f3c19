"""A cache for some heads of an attention decodes exactly these heads of the whole."""

import pytest
import torch
from dilated_core import DecodingCache, DilatedPattern, decode_step_with_lse
from dilated_core.decoding.size import decoding_cache_nbytes, decoding_cache_rows

PATTERN = DilatedPattern([8, 24, 40, 6], [1, 3, 5, 7])


def decode(cache, q, k, v, prefill):
    cache.prefill(k[:, :prefill], v[:, :prefill])
    steps = [
        decode_step_with_lse(*(x[:, [t]] for x in (q, k, v)), cache)
        for t in range(prefill, q.shape[1])
    ]
    return [torch.cat(parts, 1) for parts in zip(*steps, strict=True)]


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
@pytest.mark.parametrize(("total", "total_kv"), [(12, 12), (12, 3), (8, 4), (7, 1)])
def test_any_range_of_heads_is_the_slice_of_the_whole(total, total_kv, head_offsets):
    pattern = DilatedPattern(PATTERN.segment_lengths, PATTERN.dilation_rates,
                             head_offsets=head_offsets)  # fmt: skip
    group = total // total_kv
    q, k, v = (torch.randn(2, 30, h, 4, dtype=torch.float64) for h in (total, total_kv, total_kv))
    sizes = {"batch_size": 2, "head_dim": 4, "dtype": torch.float64}
    heads = {"num_heads": total, "num_kv_heads": total_kv}
    whole = decode(DecodingCache(pattern, **sizes, **heads), q, k, v, 12)
    # Whole groups, and parts of one group, which read one head of k and v.
    groups = [(first * group, last * group) for last in range(1, total_kv + 1)
              for first in range(last)]  # fmt: skip
    parts = [(first, last) for last in range(1, group) for first in range(last)]
    for first, last in groups + parts:
        kv = slice(first // group, -(-last // group))
        heads = {"num_heads": last - first, "num_kv_heads": kv.stop - kv.start}
        cache = DecodingCache(pattern, **sizes, **heads, head_range=(first, total))
        assert cache.head_range == (first, total)
        got = decode(cache, q[:, :, first:last], k[:, :, kv], v[:, :, kv], 12)
        for ours, theirs in zip(got, whole, strict=True):
            torch.testing.assert_close(ours, theirs[:, :, first:last], rtol=0, atol=1e-13)


def test_sizes_count_the_rows_of_the_range():
    """Head 11 of r = 8 starts at 3: of 10 positions it keeps one, and head 1 keeps two."""
    pattern = DilatedPattern([10], [8])
    assert decoding_cache_rows(pattern, num_heads=1, head_range=(11, 16)) == 1
    assert decoding_cache_rows(pattern, num_heads=1, head_range=(1, 16)) == 2
    assert decoding_cache_rows(pattern, num_heads=1, head_range=(1, 16), max_seq_len=9) == 1
    sizes = {"batch_size": 3, "num_heads": 5, "head_dim": 6, "dtype": torch.float16}
    cache = DecodingCache(pattern, **sizes, head_range=(7, 12))
    assert cache.nbytes == decoding_cache_nbytes(pattern, **sizes, head_range=(7, 12))


def test_all_heads_are_the_default():
    sizes = {"batch_size": 1, "num_heads": 4, "head_dim": 4}
    assert DecodingCache(PATTERN, **sizes).head_range == (0, 4)
    explicit = DecodingCache(PATTERN, **sizes, head_range=(0, 4))
    assert explicit.keys.shape == DecodingCache(PATTERN, **sizes).keys.shape


@pytest.mark.parametrize(
    ("error", "message", "head_range"),
    [
        (TypeError, r"head_range is 2; it must be a pair \(first, total\)", 2),
        (ValueError, r"head_range is \(5, 8\) and there are 4 heads; the heads 5 to 8", (5, 8)),
        (ValueError, "the first head of head_range is -1", (-1, 8)),
    ],
)
def test_mistakes(error, message, head_range):
    sizes = {"batch_size": 1, "num_heads": 4, "head_dim": 4, "head_range": head_range}
    with pytest.raises(error, match=message):
        DecodingCache(PATTERN, **sizes)
    with pytest.raises(error, match=message):
        decoding_cache_nbytes(PATTERN, **sizes, dtype=torch.float32)
    with pytest.raises(error, match=message):
        decoding_cache_rows(PATTERN, num_heads=4, head_range=head_range)
