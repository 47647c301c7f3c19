"""A cache works on its own device whatever the default device is, and on meta without values."""

import copy
import pickle

import pytest
import torch
from dilated_core import (
    DecodingCache,
    DilatedPattern,
    decode_step,
    decode_step_with_lse,
    decode_tokens,
)
from dilated_core import reference_dilated_attention_with_lse as reference

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])
SIZES = {"batch_size": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
TOKENS = [torch.randn(2, 30, heads, 6) for heads in (4, 2, 2)]


@pytest.fixture
def meta_by_default():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def test_a_cpu_cache_under_another_default_device(meta_by_default):
    cache = DecodingCache(PATTERN, **SIZES, device="cpu")
    cache.prefill(*(x[:, :20] for x in TOKENS[1:]))
    cache.reorder([1, 0, 1])
    cache.reorder(torch.tensor([1, 0], device="cpu"))
    state = cache.state_dict()
    assert {x.device.type for x in state.values()} == {"cpu"}
    other = DecodingCache(PATTERN, **SIZES, device="cpu")
    other.load_state_dict(state)
    copies = copy.copy(other), pickle.loads(pickle.dumps(other))
    for each in (cache, other, *copies):
        steps = [
            decode_step_with_lse(*(x[:, [t]] for x in TOKENS), each, backend="eager")
            for t in range(20, 30)
        ]
        for got, want in zip(
            zip(*steps, strict=True),
            reference(*(x.double() for x in TOKENS), PATTERN, is_causal=True),
            strict=True,
        ):
            torch.testing.assert_close(torch.cat(got, 1), want[:, 20:].float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("is_default", [True, False])
def test_a_meta_cache_has_every_size_and_no_memory(is_default, request):
    if is_default:
        request.getfixturevalue("meta_by_default")
    cache = DecodingCache(PATTERN, **SIZES, **({} if is_default else {"device": "meta"}))
    real = DecodingCache(PATTERN, **SIZES, device="cpu")
    assert cache.keys.is_meta
    assert cache.nbytes == real.nbytes > 0
    q, k, v = (x.to("meta") for x in TOKENS)
    cache.prefill(k[:, :20], v[:, :20])
    assert decode_step(q[:, :1], k[:, :1], v[:, :1], cache).shape == (2, 1, 4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = decode_step_with_lse(q[:, :1], k[:, :1], v[:, :1], cache)
    assert (out.shape, out.dtype, out.device.type) == ((2, 1, 4, 6), torch.float32, "meta")
    assert (lse.shape, lse.dtype) == ((2, 1, 4), torch.float32)
    assert decode_tokens(q, k, v, cache, lengths=[3, 0]).shape == (2, 30, 4, 6)
    assert cache.positions == (25, 22)
    cache.reorder([0, 1, 1])
    assert cache.batch_size == 3
    cache.reorder([0, 1])
    other = DecodingCache(PATTERN, **SIZES, device="meta")
    other.load_state_dict(cache.state_dict())
    assert other.positions == (25, 22)
    cache.load_state_dict(real.state_dict())
    assert cache.position == 0


def test_what_has_no_values_is_refused():
    cache = DecodingCache(PATTERN, **SIZES)
    with pytest.raises(ValueError, match="batch_indices is on meta and holds no values"):
        cache.reorder(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match="keys is on meta in state_dict and holds no values; load"):
        cache.load_state_dict(DecodingCache(PATTERN, **SIZES, device="meta").state_dict())
