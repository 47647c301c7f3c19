"""position_ids are the authority: documents, padding, gaps, and a cache's unwritten tail."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_models.huggingface.columns import find_continued, find_documents
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

Build = Callable[..., Any]


# Restarts are documents, with and without masks.


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("mask", [None, "ones"])
def test_packed_documents_are_as_if_alone(
    build_model: Build, tokens: torch.Tensor, kind: str, mask: str | None
) -> None:
    model = build_model(kind)
    lengths = [20, 1, 24]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    given_mask = None if mask is None else torch.ones_like(positions)
    packed = model(
        tokens, position_ids=positions, attention_mask=given_mask, use_cache=False
    ).logits
    alone = [model(part).logits for part in tokens.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-9, atol=1e-10)


def test_documents_of_one_row_of_positions_hold_for_all_rows(
    llama: Any, tokens: torch.Tensor
) -> None:
    positions = torch.cat([torch.arange(20), torch.arange(25)])[None]
    one = llama(tokens, position_ids=positions, use_cache=False).logits
    both = llama(tokens, position_ids=positions.expand(2, -1), use_cache=False).logits
    assert torch.equal(one, both)


def test_gradients_of_packed_documents_are_the_sums_of_those_alone(
    build_model: Build, tokens: torch.Tensor
) -> None:
    lengths = [20, 25]
    positions = torch.cat([torch.arange(n) for n in lengths])[None].expand(2, -1)
    upstream = torch.randn(2, 45, 61, dtype=torch.float64, generator=torch.manual_seed(2))
    model = build_model("llama")
    model(tokens, position_ids=positions, use_cache=False).logits.backward(upstream)
    actual = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part, seed in zip(tokens.split(lengths, 1), upstream.split(lengths, 1), strict=True):
        model(part, use_cache=False).logits.backward(seed)
    for a, p in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("positions", "match"),
    [
        ([*range(20), *range(25, 50)], r"has 25 after 19 in row 0, column 20.*dilated_ring"),
        ([*range(5, 50)], r"has 5 in row 0, column 0.*context parallelism"),
        ([*range(20), *range(1, 26)], r"has 1 after 19"),
        ([*range(22), *range(100, 123)], r"has 100 after 21"),  # head and tail of a longer one
    ],
)
def test_gaps_are_refused(
    llama: Any, tokens: torch.Tensor, positions: list[int], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        llama(tokens, position_ids=torch.tensor([positions]), use_cache=False)


def test_documents_of_a_collator_must_agree_with_positions(
    llama: Any, tokens: torch.Tensor
) -> None:
    cu = torch.tensor([0, 20, 45], dtype=torch.int32)
    restarting = torch.cat([torch.arange(20), torch.arange(25)])[None]
    one = tokens[:1]
    llama(one, position_ids=restarting, cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q is \[0, 20, 45\] and position_ids"):
        llama(one, cu_seq_lens_q=cu, cu_seq_lens_k=cu, use_cache=False)


# Padding is taken out, on whichever side it is.


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "bert"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_the_unpadded_run(
    build_model: Build, tokens: torch.Tensor, kind: str, side: str, padded: Any
) -> None:
    model = build_model(kind)
    lengths = [45, 29]
    ids, mask = padded(tokens, lengths, side)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    upstream = torch.randn(2, 45, 61, dtype=torch.float64, generator=torch.manual_seed(2))
    (logits * upstream)[mask.bool()].sum().backward()
    actual = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for b, n in enumerate(lengths):
        alone = model(tokens[b : b + 1, :n]).logits[0]
        torch.testing.assert_close(logits[b][mask[b].bool()], alone, rtol=1e-9, atol=1e-10)
        alone.backward(upstream[b][mask[b].bool()])
    for a, p in zip(actual, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_with_one_long_segment_documents_and_padding_are_those_of_sdpa(
    build_model: Build, tokens: torch.Tensor, padded: Any
) -> None:
    dense = DilatedPattern([1000], [1])
    model, sdpa = build_model("llama", dense), build_model("llama", dense, "sdpa")
    packed = {"position_ids": torch.cat([torch.arange(20), torch.arange(25)])[None]}
    actual, wanted = (x(tokens, **packed, use_cache=False).logits for x in (model, sdpa))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)
    ids, mask = padded(tokens, [45, 29], "left")
    actual, wanted = (x(ids, attention_mask=mask).logits[mask.bool()] for x in (model, sdpa))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-10)


def test_left_padding_with_positions_that_count_it_equals_the_unpadded_run(
    llama: Any, tokens: torch.Tensor, padded: Any
) -> None:
    ids, mask = padded(tokens, [45, 29], "left")
    logits = llama(ids, attention_mask=mask).logits  # RoPE depends on distances alone
    torch.testing.assert_close(logits[1, 16:], llama(tokens[1:, :29]).logits[0])


def test_padding_between_documents_is_taken_out(llama: Any, tokens: torch.Tensor) -> None:
    mask = torch.ones(1, 45, dtype=torch.int64)
    mask[:, 20:25] = 0
    positions = torch.cat([torch.arange(20), torch.zeros(5), torch.arange(20)]).long()[None]
    one = tokens[:1]
    logits = llama(one, attention_mask=mask, position_ids=positions, use_cache=False).logits
    alone = [llama(part).logits for part in (one[:, :20], one[:, 25:])]
    torch.testing.assert_close(logits[:, mask[0].bool()], torch.cat(alone, 1))
    with pytest.raises(ValueError, match="has 25 after 19"):
        llama(one, attention_mask=mask, use_cache=False)


# With a cache.


@pytest.mark.parametrize("side", ["whole", "left"])
@pytest.mark.parametrize("make", [DynamicCache, StaticCache])
@pytest.mark.parametrize("steps", [[30, 1, 1, 13], [7, 9, 29], [1] * 6 + [39]])
def test_cached_parts_equal_the_whole(
    decoder: Any,
    tokens: torch.Tensor,
    make: Any,
    steps: list[int],
    side: str,
    cached: Any,
    padded: Any,
) -> None:
    model = decoder
    lengths = [45, 45] if side == "whole" else [45, 29]
    ids, mask = padded(tokens, lengths, "left")
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = make(config=model.config, **({"max_cache_len": 64} if make is StaticCache else {}))
    outs, start = [], 0
    with torch.no_grad():
        for n in steps:
            part = slice(start, start + n)
            outs.append(
                cached(
                    model,
                    ids[:, part],
                    cache,
                    attention_mask=mask[:, : part.stop],
                    position_ids=positions[:, part],
                )
            )
            start += n
        logits = torch.cat(outs, 1)
        for b, n in enumerate(lengths):
            alone = model(tokens[b : b + 1, :n], use_cache=False).logits
            torch.testing.assert_close(logits[b, 45 - n :], alone[0], rtol=1e-9, atol=1e-10)


def test_the_unwritten_tail_of_a_static_cache_is_never_attended(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=64)
    with torch.no_grad():
        cached(llama, tokens[:, :1], cache)
        for layer in cache.layers:
            layer.keys[:, :, 1:] = torch.nan
            layer.values[:, :, 1:] = torch.nan
        for part in (slice(1, 30), slice(30, 31), slice(31, 45)):
            logits = cached(llama, tokens[:, part], cache)
        torch.testing.assert_close(logits, llama(tokens).logits[:, 31:])


def test_without_positions_and_masks_a_cache_continues(
    decoder: Any, tokens: torch.Tensor, cached: Any
) -> None:
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        parts = [cached(decoder, part, cache) for part in tokens.split([30, 1, 14], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), decoder(tokens).logits)


def test_gradients_through_a_cache_are_those_of_the_whole(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    upstream = torch.randn(2, 45, 61, dtype=torch.float64, generator=torch.manual_seed(2))
    llama(tokens).logits.backward(upstream)
    wanted = [p.grad.clone() for p in llama.parameters()]
    llama.zero_grad()
    cache = DynamicCache(config=llama.config)
    parts = [cached(llama, part, cache) for part in tokens.split([30, 15], dim=1)]
    torch.cat(parts, 1).backward(upstream)
    for w, p in zip(wanted, llama.parameters(), strict=True):
        torch.testing.assert_close(p.grad, w, rtol=1e-9, atol=1e-10)


def test_positions_that_do_not_continue_the_cache_are_refused(
    llama: Any, tokens: torch.Tensor, cached: Any
) -> None:
    with torch.no_grad():
        for positions, match in [([[3]], "has 3 in row 0, column 10"), ([[11]], "has 11")]:
            cache = DynamicCache(config=llama.config)
            cached(llama, tokens[:, :10], cache)
            with pytest.raises(ValueError, match=match):
                cached(llama, tokens[:, 10:11], cache, position_ids=torch.tensor(positions))
        cache = DynamicCache(config=llama.config)
        cached(llama, tokens[:, :10], cache)
        with pytest.raises(ValueError, match="attention_mask has 1 columns; it must have 11"):
            cached(llama, tokens[:, 10:11], cache, attention_mask=torch.ones(2, 1))


# The two functions that read columns, against loops.


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_documents_are_found_wherever_padding_is(rows: list[list[int]], random: Any) -> None:
    n = max(sum(lengths) for lengths in rows) + 3
    visible = torch.zeros(len(rows), n, dtype=torch.bool)
    positions = torch.randint(-3, 9, (len(rows), n))
    bounds, at = [0], []
    for b, lengths in enumerate(rows):
        columns = sorted(random.sample(range(n), sum(lengths)))
        visible[b, columns] = True
        positions[b, columns] = torch.cat([torch.arange(length) for length in lengths])
        at += [(b, column) for column in columns]
        for length in lengths:
            bounds.append(bounds[-1] + length)
    packed = find_documents(positions, visible, len(rows), n)
    assert packed is not None
    assert packed.cu_seqlens.tolist() == bounds
    assert list(zip(packed.rows.tolist(), packed.columns.tolist(), strict=True)) == at


def test_a_row_of_padding_alone_has_no_document() -> None:
    visible = torch.tensor([[True, True], [False, False]])
    packed = find_documents(None, visible, 2, 2)
    assert packed is not None
    assert packed.cu_seqlens.tolist() == [0, 2]
    nothing = find_documents(None, torch.zeros(1, 3, dtype=torch.bool), 1, 3)
    assert nothing is not None
    assert nothing.cu_seqlens.tolist() == [0]
    found = find_continued(None, torch.tensor([[True, False, True], [False] * 3]), 1, 3)
    assert found is not None
    assert [(tokens.tolist(), count) for tokens, count in found] == [([0, 2], 1), ([], 0)]
