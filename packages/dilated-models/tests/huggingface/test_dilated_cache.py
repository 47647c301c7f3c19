"""A DilatedCache keeps what later tokens can see; `test_generation` has it in `generate`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from dilated_core import DilatedPattern, decoding_cache_rows
from dilated_models.huggingface import DilatedCache, dilated_pattern
from dilated_models.huggingface.bounded_cache import CACHE_NAME

Build = Callable[..., Any]
needs_5_24 = pytest.mark.skipif(CACHE_NAME != "cache", reason="transformers is older than 5.24")


@pytest.mark.skipif(CACHE_NAME == "cache", reason="transformers has what a DilatedCache needs")
def test_older_versions_of_transformers_are_refused(llama: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"needs transformers 5\.24.*DynamicCache"):
        DilatedCache(llama.config)


@needs_5_24
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("steps", [[30, 1, 1, 13], [1] * 6 + [39]])
@torch.no_grad()
def test_parts_equal_the_whole(
    decoder: Any, tokens: torch.Tensor, steps: list[int], side: str, cached: Any, padded: Any
) -> None:
    lengths = [45, 29]
    ids, mask = padded(tokens, lengths, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, outs, stop = DilatedCache(decoder.config), [], 0
    for n in steps:
        part, stop = slice(stop, stop + n), stop + n
        given = {"attention_mask": mask[:, :stop], "position_ids": positions[:, part]}
        outs.append(cached(decoder, ids[:, part], cache, **given))
    for b, n in enumerate(lengths):
        alone = decoder(tokens[b : b + 1, :n], use_cache=False).logits
        actual = torch.cat(outs, 1)[b][mask[b].bool()]
        torch.testing.assert_close(actual, alone[0], rtol=1e-9, atol=1e-10)


@needs_5_24
@torch.no_grad()
def test_the_cache_keeps_the_rows_that_the_pattern_sees_however_long_the_text_is(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    cache = DilatedCache(llama.config)
    pattern = DilatedPattern(llama.config.segment_lengths, llama.config.dilation_rates)
    rows = decoding_cache_rows(pattern, num_heads=4, num_kv_heads=2)
    for count in range(1, 6):
        cached(llama, tokens, cache)
        assert cache.get_seq_length() == 45 * count
        assert [layer.state.keys.shape for layer in cache.layers] == [(2, rows, 8)] * 2
        assert cache.nbytes == 2 * 2 * 2 * rows * 8 * 8  # layers, k and v, B, rows, D, float64
    short = DilatedCache(llama.config, max_cache_len=45)
    torch.testing.assert_close(cached(llama, tokens, short), llama(tokens).logits)
    assert short.get_max_length() == 45
    with pytest.raises(ValueError, match="max_seq_len is 45"):
        cached(llama, tokens[:, :1], short)


@needs_5_24
@torch.no_grad()
def test_rows_of_a_batch_are_chosen_copied_and_forgotten(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    cache = DilatedCache(llama.config)
    for change in ("reset", "reorder_cache", "batch_select_indices", "crop"):  # nothing to change
        getattr(cache, change)(*{"reset": (), "crop": (0,)}.get(change, (torch.tensor([0]),)))
    cached(llama, tokens[:, :20], cache)
    kept = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([True, True, False, True]))  # rows 1, 0, 1
    order = torch.tensor([1, 0, 1])
    wanted = llama(tokens).logits[order, 20:]
    torch.testing.assert_close(cached(llama, tokens[order, 20:], cache), wanted)
    torch.testing.assert_close(cached(llama, tokens[:, 20:], kept), llama(tokens).logits[:, 20:])
    kept.reset()
    torch.testing.assert_close(cached(llama, tokens[:1], kept), llama(tokens[:1]).logits)


@needs_5_24
@torch.no_grad()
def test_a_pattern_of_a_with_and_a_named_backend_are_honoured(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    cache = DilatedCache(llama.config)
    with dilated_pattern([6, 24], [1, 5], backend="sdpa"):
        parts = [cached(llama, part, cache) for part in tokens.split([30, 1, 14], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), llama(tokens).logits)
    with pytest.raises(ValueError, match="make a new DilatedCache for another pattern"):
        cached(llama, tokens[:, :1], cache)


@needs_5_24
@torch.no_grad()
def test_bfloat16_is_as_near_as_without_a_cache(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    exact = llama(tokens).logits
    model = llama.bfloat16()
    whole = (model(tokens).logits - exact).abs().max()
    cache = DilatedCache(model.config)
    parts = [cached(model, part, cache) for part in tokens.split([30, 1, 14], dim=1)]
    assert (torch.cat(parts, 1) - exact).abs().max() <= 2 * whole


@needs_5_24
@pytest.mark.exhaustive  # half a minute of compilation
@torch.no_grad()
def test_a_compiled_model_continues_the_cache(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    cache = DilatedCache(llama.config)
    compiled = torch.compile(llama, backend="eager")
    parts = [cached(compiled, part, cache) for part in tokens.split([30, 1, 14], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), llama(tokens).logits)
    torch._dynamo.reset()


@needs_5_24
def test_what_cannot_be_honoured_is_refused(
    build_model: Build, llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    def new() -> DilatedCache:
        return DilatedCache(llama.config)

    with pytest.raises(ValueError, match="requires a gradient, which a cache cannot carry"):
        cached(llama, tokens, new())
    with torch.no_grad():
        restarting = torch.cat([torch.arange(20), torch.arange(25)])[None]
        for given, match in [
            ({"position_ids": restarting}, "one text for each row"),
            ({"position_ids": torch.arange(5, 50)[None]}, "has 5 in row 0"),
            ({"is_causal": False}, "is_causal is False"),
            ({"attention_mask": torch.ones(2, 3)}, "attention_mask has 3 columns"),
        ]:
            with pytest.raises(ValueError, match=match):
                cached(llama, tokens, new(), **given)
        cache = new()
        cached(llama, tokens[:, :10], cache)
        for position in (3, 11):
            other = copy.deepcopy(cache)
            with pytest.raises(ValueError, match=f"has {position} in row 0, column 10"):
                cached(llama, tokens[:, 10:11], other, position_ids=torch.tensor([[position]]))
            with pytest.raises(ValueError, match="the call ended with an error"):
                cached(llama, tokens[:, 10:11], other)
        with pytest.raises(ValueError, match="without an assistant model"):
            cache.crop(-1)
        with pytest.raises(ValueError, match="not offloaded"):
            cache.layers[0].offload()
        layer = llama.model.layers[0].self_attn
        layer.attention_dropout = 0.5
        with pytest.raises(ValueError, match=r"dropout of attention is 0\.5"):
            cached(llama.train(), tokens, new())


@needs_5_24
@torch.no_grad()
def test_other_attention_and_other_models_are_refused(
    build_model: Build, tokens: torch.Tensor, cached: Any
) -> None:
    dense = build_model("llama", attention="sdpa")
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa'.*set_attn_implementation"):
        cached(dense, tokens, DilatedCache(dense.config))
    # A cache that was made for another model: the second call finds the tokens of the first.
    cache = DilatedCache(build_model("llama").config)
    cached(dense, tokens[:, :10], cache)
    with pytest.raises(ValueError, match="the model's attention is not 'dilated'"):
        cached(dense, tokens[:, 10:], cache)
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48}
    pattern = {"segment_lengths": [8], "dilation_rates": [1]}
    for kind, match in [
        ("GPTNeoX", "does not hand the arguments of its attention"),
        ("DiffLlama", "attends more than once for each update"),
    ]:
        config = getattr(transformers, f"{kind}Config")(num_attention_heads=4, **sizes, **pattern)
        build = getattr(transformers, f"{kind}ForCausalLM")._from_config
        with pytest.raises(ValueError, match=match):
            cached(
                build(config, attn_implementation="dilated").eval(), tokens, DilatedCache(config)
            )
    sliding = transformers.Qwen2Config(num_hidden_layers=2, use_sliding_window=True)
    sliding.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"Qwen2Config has layers of \['sliding_attention'\]"):
        DilatedCache(sliding)
