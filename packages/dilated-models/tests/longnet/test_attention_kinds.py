"""Attention by blocks in a LongNetLM, fixed or chosen: config, training, generation, refusals."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from dilated_core.testing.processes import run_processes
from dilated_models import GenerationCache, LongNetConfig, LongNetLM
from dilated_models.layers.context_parallel import ContextParallel
from dilated_models.longnet.generation import generate, generate_batch
from dilated_models.longnet.saving import load_model, save_model, write_config
from dilated_sparse import (
    AdaptiveSparseAttention,
    BlockSparseAttention,
    MoBAAttention,
    NativeSparseAttention,
)

SPARSE = {"pattern_type": "global_local", "sparsity_ratio": 0.5, "block_size": 4}
KINDS = {
    "block_sparse": SPARSE,
    "block_sparse_adaptive": {"block_size": 4, "topk": 4, "gate_dim": 8},
    "moba": {"block_size": 4, "topk": 3},
    "nsa": {
        "compression_block_size": 4,
        "compression_stride": 2,
        "selection_block_size": 4,
        "num_selected_blocks": 3,
        "window_size": 5,
    },
}
MODULES = {
    "block_sparse": BlockSparseAttention,
    "block_sparse_adaptive": AdaptiveSparseAttention,
    "moba": MoBAAttention,
    "nsa": NativeSparseAttention,
}


def config_of(kind: str, **options) -> LongNetConfig:
    return LongNetConfig(
        num_tokens=61,
        d_model=32,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=64,
        attention_kind=kind,
        attention_options=KINDS[kind],
        **options,
    )


def model_of(kind: str, **options) -> LongNetLM:
    torch.manual_seed(0)
    model = LongNetLM(config_of(kind, **options)).double().eval()
    if kind == "block_sparse_adaptive":  # as if it had learned: its correction is 0 at first
        for block in model.blocks:
            for parameter in block.attention.attention.gate.parameters():
                torch.nn.init.normal_(parameter)
    return model


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_each_block_has_attention_of_the_kind_with_its_options(kind: str) -> None:
    config = config_of(kind, backend="eager")
    assert LongNetConfig.from_json(config.to_json()) == config
    assert hash(config) == hash(copy.copy(config))
    assert config.to_dict()["attention_options"] == KINDS[kind]
    for block in LongNetLM(config).blocks:
        attention = block.attention.attention
        assert isinstance(attention, MODULES[kind])
        options = attention.attention_config if kind == "nsa" else attention.config
        assert options.backend == "eager"
        for name, value in KINDS[kind].items():
            assert getattr(options, name) == value
    with pytest.raises(ValueError, match="only 'dilated' and 'ring' attention have a pattern"):
        _ = config.pattern


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns_and_no_future_leaks(kind: str) -> None:
    model = model_of(kind, key_conv=3).train()
    tokens = tokens_of(2, 37)
    logits = model(tokens)
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    ).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A bias of keys moves all scores of a query alike, which a softmax does not show.
        no_gradient = name.endswith(("k_proj.bias", "compress_k.down.bias"))
        assert parameter.grad.abs().sum() > 0 or no_gradient, name
    for t in (1, 4, 22):
        changed = torch.cat([tokens[:, :t], tokens_of(2, 37 - t, seed=9)], 1)
        torch.testing.assert_close(model(changed)[:, :t], logits[:, :t])
        # A shorter text: the pattern of a row does not depend on what follows.
        torch.testing.assert_close(model(tokens[:, :t]), logits[:, :t])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_as_alone(kind: str) -> None:
    model, tokens = model_of(kind), tokens_of(50)
    bounds = [0, 9, 10, 10, 41, 50]
    packed = model(tokens, cu_seqlens=torch.tensor(bounds))
    for a, b in pairwise(bounds):
        if b > a:
            torch.testing.assert_close(packed[a:b], model(tokens[None, a:b])[0])


@pytest.mark.parametrize("positions", ["xpos", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_continues_as_the_whole_text(kind: str, positions: str) -> None:
    num_kv_heads = 2 if positions == "xpos" else None
    model = model_of(kind, positions=positions, key_conv=3, num_kv_heads=num_kv_heads)
    tokens = tokens_of(3, 40)
    whole = model(tokens)
    cache = GenerationCache(model, 3)
    lengths = [5, 17, 16]
    last = model(tokens[:, :17], cache=cache, lengths=lengths)
    for text, length in enumerate(lengths):
        torch.testing.assert_close(last[text, 0], whole[text, length - 1])
    assert cache.positions == (5, 17, 16)
    for step in range(20):
        now = torch.stack([tokens[text, length + step] for text, length in enumerate(lengths)])
        last = model(now[:, None], cache=cache)
        for text, length in enumerate(lengths):
            torch.testing.assert_close(last[text, 0], whole[text, length + step])
    other = copy.copy(cache)
    cache.reorder([2, 0])
    assert cache.positions == (36, 25)
    torch.testing.assert_close(
        model(torch.stack([tokens[2, 36:39], tokens[0, 25:28]]), cache=cache)[:, 0],
        torch.stack([whole[2, 38], whole[0, 27]]),
    )
    assert other.positions == (25, 37, 36)
    cache.reset()
    again = model(tokens[:2, :6], cache=cache)
    torch.testing.assert_close(again[:, 0], whole[:2, 5])


def test_the_history_grows_to_its_limit() -> None:
    model = model_of("moba")
    tokens = tokens_of(1, 300)
    whole = model(tokens)
    cache = GenerationCache(model, max_seq_len=301)
    model(tokens[:, :250], cache=cache)
    room = cache.nbytes
    for t in range(250, 300):
        logits = model(tokens[:, t : t + 1], cache=cache)
    torch.testing.assert_close(logits[:, 0], whole[:, -1])
    assert room < cache.nbytes == 2 * 2 * 301 * 32 * 8  # blocks, keys and values, tokens, d_model
    with pytest.raises(ValueError, match="max_seq_len of the cache is 301"):
        model(tokens[:, :2], cache=cache)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_takes_the_most_likely_tokens_of_the_whole_text(kind: str) -> None:
    model = model_of(kind)
    text = [3, 1, 4, 1, 5]
    got = list(generate(model, text, max_new_tokens=12, temperature=0))
    for token in got:
        assert token == int(model(torch.tensor([text]))[0, -1].argmax())
        text = [*text, token]
    steps = generate_batch(model, [[3, 1, 4, 1, 5], [9, 2]], max_new_tokens=4, temperature=0)
    assert [first for first, _ in steps] == got[:4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_comes_back(kind: str, tmp_path) -> None:
    model = LongNetLM(config_of(kind)).eval()
    write_config(tmp_path, {"model": model.config.to_dict(), "tokenizer": "bytes"})
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config
    tokens = tokens_of(1, 30)
    assert torch.equal(loaded(tokens), model(tokens))


def over_ranks() -> None:
    from dilated_ring import shard_sequence

    model, tokens = model_of("block_sparse"), tokens_of(1, 42)
    local = shard_sequence(tokens, dim=1)
    logits = model(local, context_parallel=ContextParallel())
    expected = shard_sequence(model(tokens), dim=1)
    torch.testing.assert_close(logits, expected)


def test_block_sparse_attention_over_ranks_is_that_of_one_device() -> None:
    run_processes(over_ranks, 2)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "attention_kind is 'sparse'", {"attention_kind": "sparse"}),
        (ValueError, "segment_lengths is", {"segment_lengths": [8], "dilation_rates": [1]}),
        (ValueError, "local_window is 8", {"local_window": 8}),
        (ValueError, "padding is 'attended'", {"padding": "attended"}),
        (ValueError, "holds dropout", {"attention_options": {"dropout": 0.1}}),
        (ValueError, "holds backend", {"attention_options": {"backend": "sdpa"}}),
        (ValueError, "topk is 0", {"attention_options": {"topk": 0}}),
        (TypeError, "sparsity_ratio", {"attention_options": {"sparsity_ratio": 0.1}}),
        (TypeError, "must be a dict", {"attention_options": 5}),
        (
            ValueError,
            "whose options are fields of this config",
            {"attention_kind": "dilated", "attention_options": {"block_size": 4}},
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(error, message: str, change: dict) -> None:
    with pytest.raises(error, match=message):
        dataclasses.replace(config_of("moba"), **change)


def test_calls_that_cannot_be_honoured_are_refused() -> None:
    model = model_of("moba")
    with pytest.raises(ValueError, match="causal attention only"):
        model(tokens_of(1, 9), is_causal=False)
    for kind in ("block_sparse_adaptive", "moba", "nsa"):
        with pytest.raises(ValueError, match="must be one of 'dilated', 'ring', 'block_sparse'"):
            model_of(kind)(tokens_of(1, 9), context_parallel=ContextParallel())
    with pytest.raises(ValueError, match="lookahead=True; it must be False"):
        dataclasses.replace(config_of("moba"), attention_options={"lookahead": True})
    with pytest.raises(ValueError, match="holds num_heads"):
        dataclasses.replace(config_of("nsa"), attention_options={"num_heads": 4})
    # Where a cache cannot move the center of xPos: before the first token is taken in.
    model = model_of("block_sparse_adaptive", xpos_scale_base=1.0)
    cache = GenerationCache(model)
    with pytest.raises(ValueError, match="positions from the center"):
        model(tokens_of(1, 700), cache=cache)
    assert cache.positions == (0,)


def test_weights_drawn_anew_are_those_of_a_new_model() -> None:
    for kind in KINDS:
        torch.manual_seed(1)
        model, torch_state = LongNetLM(config_of(kind)), torch.get_rng_state()
        before = {name: x.clone() for name, x in model.state_dict().items()}
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 7.0)
        torch.manual_seed(0)
        model.reset_parameters()
        for name, x in model.state_dict().items():
            assert not (x == 7).any(), name
            if x.numel() > 100:  # of few draws the deviation is a draw itself
                assert x.std() < 2 * before[name].std() + 1e-6, name
        torch.set_rng_state(torch_state)
        config_of(kind)  # options are checked without a draw
        assert torch.equal(torch.get_rng_state(), torch_state)
