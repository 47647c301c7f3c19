"""A model with a cache gives the logits of the full forward, token by token and part by part."""

import copy
import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from dilated_models import GenerationCache, LongNetConfig, LongNetLM
from dilated_models.longnet import generation_cache

S = 130  # beyond three segments of the longest branch

CONFIGS = {
    "xpos": {},
    "rotary, grouped queries": {"positions": "rotary", "num_kv_heads": 2},
    "none": {"positions": "none"},
    "alibi": {"positions": "alibi", "num_kv_heads": 2},
    "key_conv": {"key_conv": 4},
    "key_conv of one token": {"key_conv": 1, "positions": "none"},
    "zero keys attended": {"padding": "attended", "key_conv": 3},
    "blocked offsets, one head of keys": {"head_offsets": "blocked", "num_kv_heads": 1},
    "one branch": {"segment_lengths": (32,), "dilation_rates": (1,)},
    "nested branches": {"segment_lengths": (8, 32, 64), "dilation_rates": (1, 4, 8)},
    "a rate above the heads": {"segment_lengths": (8, 200), "dilation_rates": (1, 11)},
    "tied, no final norm": {"tie_embeddings": True, "final_layer_norm": False},
    "sdpa": {"backend": "sdpa"},
    "eager": {"backend": "eager", "key_conv": 2},
}


def make_model(config: LongNetConfig, **changes: object) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(dataclasses.replace(config, **changes), dtype=torch.float64).eval()
    for block in model.blocks:
        if block.key_conv is not None:
            torch.nn.init.normal_(block.key_conv.weight)  # drawn as zeros, the identity
    return model


def text(batch_size: int, length: int = S) -> torch.Tensor:
    return torch.randint(61, (batch_size, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[4096, 7], ids=["one part", "small parts"])
def parts(request, monkeypatch):
    monkeypatch.setattr(generation_cache, "_TOKENS_PER_PART", request.param)


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_steps_are_rows_of_the_full_forward(config, changes, parts):
    model = make_model(config, **changes)
    tokens = text(2)
    with torch.no_grad():
        want = model(tokens)
    cache = GenerationCache(model, 2)
    prompt = 50
    logits = model(tokens[:, :prompt], cache=cache)
    torch.testing.assert_close(logits, want[:, [prompt - 1]], rtol=0, atol=1e-11)
    for t in range(prompt, 90):
        logits = model(tokens[:, [t]], cache=cache)
        torch.testing.assert_close(logits, want[:, [t]], rtol=0, atol=1e-11)
    logits = model(tokens[:, 90:], cache=cache)
    torch.testing.assert_close(logits, want[:, [-1]], rtol=0, atol=1e-11)
    assert cache.positions == (S, S)
    assert not logits.requires_grad


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
def test_texts_of_different_lengths_are_each_alone(config, changes, parts):
    """Prompts, steps and continuations; a text may get nothing in a call."""
    model = make_model(config, **changes)
    tokens = text(3)
    with torch.no_grad():
        want = model(tokens)
    cache = GenerationCache(model, 3)
    for lengths in ([0, 41, 9], [60, 2, 0], [1, 1, 1], [1, 30, 77], [3, 0, 3]):
        positions = cache.positions
        width = max(lengths)
        padded = torch.nn.functional.pad(tokens, (0, width), value=60)
        now = torch.stack([padded[b, p : p + width] for b, p in enumerate(positions)])
        given = None if lengths == [1, 1, 1] else torch.tensor(lengths)
        logits = model(now, cache=cache, lengths=given)
        for b, n in enumerate(lengths):
            if n:
                expected = want[b, positions[b] + n - 1]
                torch.testing.assert_close(logits[b, 0], expected, rtol=0, atol=1e-11)
            else:
                assert logits[b].isnan().all()
        assert cache.positions == tuple(p + n for p, n in zip(positions, lengths, strict=True))


def test_the_center_of_xpos_moves_with_the_text(config):
    """The factors stay in range, and no score changes."""
    model = make_model(config, xpos_scale_base=1.0)  # float64 ends at 508 tokens from the center
    tokens = text(2, 1000)
    with torch.no_grad():
        want = model(tokens)  # its center is at 500
    cache = GenerationCache(model, 2)
    bounds = [0, 450, 505, *range(506, 520), *range(540, 1000, 23), 1000]
    for start, stop in pairwise(bounds):
        logits = model(tokens[:, start:stop], cache=cache)
        torch.testing.assert_close(logits, want[:, [stop - 1]], rtol=0, atol=1e-11)
        largest = max(block.attention.keys.abs().max() for block in cache.blocks)
        assert largest < torch.finfo(torch.float64).max ** 0.95
    assert cache._centers != [0, 0]


def test_xpos_of_the_paper_at_128k_tokens_in_float32(config):
    """A full forward in float32 refuses this length; in float64 it is the reference."""
    shape = {"segment_lengths": (64, 2048, 32768), "dilation_rates": (1, 32, 512)}
    model = make_model(config, num_decoder_layers=1, **shape)
    tokens = text(1, 2**17 + 3)
    with torch.no_grad():
        hidden = model(tokens)[:, -4:]
    model = model.float()
    with pytest.raises(ValueError, match=r"stays within the range of torch\.float32 up to"):
        model(tokens)
    cache = GenerationCache(model)
    got = [model(tokens[:, : 2**17], cache=cache)]
    got += [model(tokens[:, [t]], cache=cache) for t in range(2**17, 2**17 + 3)]
    torch.testing.assert_close(torch.cat(got, 1), hidden.float(), rtol=0, atol=2e-5)


def test_a_segment_beyond_the_range_of_xpos_ends_in_an_error(config):
    model = make_model(config, segment_lengths=(6, 5000), dilation_rates=(1, 4),
                       xpos_scale_base=1.0)  # fmt: skip
    cache = GenerationCache(model)
    with pytest.raises(ValueError, match="xPos with a scale base of 1 stays within the range"):
        model(text(1, 1100), cache=cache)


def test_memory_does_not_grow(config):
    model = make_model(config, key_conv=4)
    cache = GenerationCache(model, 2)
    nbytes = cache.nbytes
    model(text(2, 100), cache=cache)
    model(text(2, 1), cache=cache)
    assert cache.nbytes == nbytes
    assert cache.blocks[0].inputs.untyped_storage().nbytes() == 2 * 3 * 32 * 8


def test_copies_orders_and_resets(config):
    model = make_model(config, key_conv=4, xpos_scale_base=0.1)
    tokens = text(2, 95)
    cache = GenerationCache(model, 2)
    model(tokens[:, :90], cache=cache, lengths=[90, 3])  # one text has moved its center
    branched = copy.copy(cache)
    model(tokens[:, 90:], cache=cache)
    assert branched.positions == (90, 3)
    branched.reorder([1, 0, 1])
    swapped = branched.positions
    assert (swapped, branched.batch_size) == ((3, 90, 3), 3)
    got = model(torch.stack([tokens[1, :1], tokens[0, :1], tokens[1, :1]]), cache=branched)
    again = GenerationCache(model, 2)
    model(tokens[:, :90], cache=again, lengths=[90, 3])
    want = model(torch.stack([tokens[0, :1], tokens[1, :1]]), cache=again)
    torch.testing.assert_close(got, want[[1, 0, 1]], rtol=0, atol=1e-12)
    cache.reset()
    assert cache.positions == (0, 0)
    model(tokens[:, :90], cache=cache, lengths=[90, 3])
    torch.testing.assert_close(
        model(torch.stack([tokens[0, :1], tokens[1, :1]]), cache=cache), want, rtol=0, atol=1e-12
    )


def test_half_precision_and_autocast(config):
    tokens = text(2, 60)
    exact = make_model(config, key_conv=3)
    with torch.no_grad():
        want = exact(tokens)[:, [-1]]
        half = exact.bfloat16()
        half_error = (half(tokens)[:, [-1]] - want).abs().max()
    cache = GenerationCache(half, 2)
    half(tokens[:, :59], cache=cache)
    got = half(tokens[:, 59:], cache=cache)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 2 * half_error
    full = make_model(config, key_conv=3).float()
    with torch.autocast("cpu", torch.bfloat16):
        cache = GenerationCache(full, 2)
        assert cache.blocks[0].attention.keys.dtype == torch.bfloat16
        full(tokens[:, :59], cache=cache)
        got = full(tokens[:, 59:], cache=cache)
    assert (got - want).abs().max() <= 2 * half_error


def test_on_meta_tensors(config):
    model = LongNetLM(config, device="meta")
    cache = GenerationCache(model, 2)
    tokens = text(2, 20).to("meta")
    assert model(tokens, cache=cache).shape == (2, 1, 61)
    assert model(tokens[:, :1], cache=cache).is_meta


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "cache is a dict; it must be a GenerationCache", {"cache": {}}),
        (ValueError, "is_causal is False; it must be True with a cache", {"is_causal": False}),
        (ValueError, "positions and cache are both given", {"positions": torch.arange(4)}),
        (ValueError, "cu_seqlens and cache are both given", {"cu_seqlens": torch.tensor([0, 4])}),
        (ValueError, "an entry of lengths is 5; it must be at most 4", {"lengths": [5, 1]}),
        (ValueError, "lengths has 1 entries; .* here 2", {"lengths": [3]}),
        (ValueError, "lengths is given without a cache", {"cache": None, "lengths": [1, 2]}),
        (ValueError, "tokens has 3 sequences and the cache 2", {"tokens": text(3, 4)}),
        (ValueError, "a text has 38 tokens and 4 more are given; max_seq_len of the cache is 40",
         {"lengths": [1, 4]}),
    ],
)  # fmt: skip
def test_mistakes_leave_the_cache_alone(config, error, message, arguments):
    model = make_model(config)
    cache = GenerationCache(model, 2, max_seq_len=40)
    model(text(2, 38), cache=cache, lengths=[2, 38])
    with pytest.raises(error, match=message):
        model(**({"tokens": text(2, 4), "cache": cache, "lengths": [4, 2]} | arguments))
    assert cache.positions == (2, 38)


def test_a_cache_of_another_model_or_of_an_interrupted_call_is_refused(config):
    model = make_model(config)
    cache = GenerationCache(make_model(config, nhead=2), 2)
    with pytest.raises(ValueError, match="cache was made for a model with another configuration"):
        model(text(2, 4), cache=cache)
    cache = GenerationCache(model, 2)
    model.blocks[1].feed_forward_norm.weight.data = torch.ones(3, dtype=torch.float64)
    with pytest.raises(RuntimeError):
        model(text(2, 4), cache=cache)
    cache.blocks[1].attention.reset()
    with pytest.raises(ValueError, match="hold different numbers of tokens"):
        model(text(2, 4), cache=cache)


def test_arguments_of_a_cache(config):
    model = make_model(config)
    with pytest.raises(ValueError, match="batch_size is -1"):
        GenerationCache(model, -1)
    with pytest.raises(TypeError, match=r"max_seq_len is 2\.5"):
        GenerationCache(model, max_seq_len=2.5)
    assert math.isclose(GenerationCache(model).nbytes * 3, GenerationCache(model, 3).nbytes)


@pytest.mark.parametrize("indices", [[True], [0.7], [True, 1], ["0"], None, torch.tensor([True])])
def test_only_integers_reorder(config, indices):
    cache = GenerationCache(LongNetLM(config), 2)
    with pytest.raises(TypeError, match=r"batch_indices.*(integer|list of integers)"):
        cache.reorder(indices)
    assert cache.batch_size == 2


def test_is_causal_is_a_bool(config):
    model = LongNetLM(config)
    with pytest.raises(TypeError, match="is_causal is 1; it must be True or False"):
        model(torch.tensor([[1]]), is_causal=1, cache=GenerationCache(model))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_an_unknown_token_changes_nothing(config, monkeypatch, token):
    monkeypatch.setattr(generation_cache, "_TOKENS_PER_PART", 4)
    model = LongNetLM(config)
    cache = GenerationCache(model)
    tokens = torch.zeros(1, 10, dtype=torch.int64)
    tokens[0, 9] = token
    with pytest.raises(ValueError, match=rf"tokens holds {token}; each must be at least 0 and"):
        model(tokens, cache=cache)
    assert cache.positions == (0,)
