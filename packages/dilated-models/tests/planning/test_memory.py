"""Planned memory against every allocation of PyTorch in a step."""

import dataclasses

import pytest
import torch
from dilated_core import memory_profile
from dilated_models import GenerationCache, LongNet, LongNetConfig, LongNetLM
from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig
from dilated_models.planning.attention import work_of
from dilated_models.planning.caches import cache_bytes
from dilated_models.planning.job import Job
from dilated_models.planning.memory import memory_of
from dilated_models.planning.operations import operations_of
from torch.utils.flop_counter import FlopCounterMode

DEFAULT = LongNetConfig(num_tokens=1)
WITHOUT_BRANCHES = {
    "segment_lengths": DEFAULT.segment_lengths,
    "dilation_rates": DEFAULT.dilation_rates,
}
TRAININGS = {
    "plain": ({}, {}),
    "gelu, convolution, dropout": ({"activation": "gelu", "key_conv": 3, "dropout": 0.1}, {}),
    "recomputed": ({"activation_checkpointing": True}, {}),
    "autocast": ({}, {"dtype": "bfloat16"}),
    "encoder, grouped queries": ({"num_encoder_layers": 1, "num_kv_heads": 2}, {}),
    "large vocabulary": ({"num_tokens": 2048, "tie_embeddings": True}, {}),
    "whole logits": ({"num_tokens": 2048}, {"chunked_loss": False}),
}
MORE = {
    "autocast, recomputed": ({"activation_checkpointing": True}, {"dtype": "bfloat16"}),
    "autocast, gelu": ({"activation": "gelu"}, {"dtype": "bfloat16"}),
    "parts": ({}, {"batch_size": 4, "accumulation": 2}),
    "few tokens": ({"d_model": 256, "dim_feedforward": 1024}, {"seq_len": 32}),
    "dense": ({"segment_lengths": [256], "dilation_rates": [1]}, {}),
    "narrow feed-forward": (
        {"dim_feedforward": 64, "segment_lengths": [256, 256], "dilation_rates": [1, 1]}, {},
    ),
    "alibi": ({"positions": "alibi"}, {}),
    "window": ({"local_window": 16}, {}),
    "blocks": ({"attention_kind": "block_sparse", **WITHOUT_BRANCHES}, {}),
    "moba": (
        {"attention_kind": "moba", "attention_options": {"block_size": 32}, **WITHOUT_BRANCHES},
        {"seq_len": 1000},
    ),
    "nsa": ({"attention_kind": "nsa", **WITHOUT_BRANCHES}, {"seq_len": 1000}),
    "nsa, grouped queries": (
        {"attention_kind": "nsa", "num_kv_heads": 1, **WITHOUT_BRANCHES}, {"seq_len": 1000},
    ),
    "adaptive": (
        {"attention_kind": "block_sparse_adaptive", **WITHOUT_BRANCHES}, {"seq_len": 1000},
    ),
    "adaptive, all, bias": (
        {"attention_kind": "block_sparse_adaptive", **WITHOUT_BRANCHES,
         "attention_options": {"distillation": "all", "gate_gradient": "bias", "topk": 4}},
        {"seq_len": 1000},
    ),
}  # fmt: skip


def check_training(config, training_of, change, options, *, within):
    model = dataclasses.replace(config, **change)
    job = Job(model=model, **({"seq_len": 256, "batch_size": 2} | options))
    training = training_of(job)
    training.step()  # makes the optimiser's state
    training.optimizer.zero_grad(set_to_none=True)
    with memory_profile() as profile:
        training.step()
    before = 12 * sum(parameter.numel() for parameter in training.model.parameters())
    assert memory_of(job).total == pytest.approx(before + profile.peak_bytes, rel=within)


@pytest.mark.parametrize("name", TRAININGS)
def test_training(config, training_of, name):
    check_training(config, training_of, *TRAININGS[name], within=0.1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MORE)
def test_more_trainings(config, training_of, name):
    check_training(config, training_of, *MORE[name], within=0.2)


@pytest.mark.parametrize("mode", ["forward", "prefill", "decoding"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_inference(config, mode, dtype):
    job = Job(model=config, mode=mode, seq_len=700, batch_size=2, dtype=dtype)
    model = LongNetLM(config, dtype=getattr(torch, dtype)).eval()
    tokens = torch.zeros(2, 700, dtype=torch.int64)
    before = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        model(tokens[:, :8])
        cache = GenerationCache(model, 2) if mode != "forward" else None
        if mode == "decoding":
            model(tokens, cache=cache)
        if cache is not None:
            assert cache.nbytes == cache_bytes(job)
            before += cache.nbytes
        with memory_profile() as profile:
            model(tokens[:, :1] if mode == "decoding" else tokens, cache=cache)
    assert memory_of(job).total == pytest.approx(before + profile.peak_bytes, rel=0.2)


CACHES = {
    "window, grouped queries": {"local_window": 16, "num_kv_heads": 2},
    "encoder, convolution": {"num_encoder_layers": 2, "num_kv_heads": 2, "key_conv": 3},
    "alibi": {"positions": "alibi"},
    "block_sparse": {"attention_kind": "block_sparse", **WITHOUT_BRANCHES},
    "block_sparse_adaptive": {"attention_kind": "block_sparse_adaptive", **WITHOUT_BRANCHES},
    "moba": {"attention_kind": "moba", "num_kv_heads": 2, **WITHOUT_BRANCHES},
    "nsa": {"attention_kind": "nsa", **WITHOUT_BRANCHES},
}


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("seq_len", [127, 300])
def test_caches_to_the_byte(config, name, seq_len):
    config = dataclasses.replace(config, num_decoder_layers=1, **CACHES[name])
    model = LongNetLM(config).eval()
    cache = GenerationCache(model, 2)
    with torch.no_grad():
        model(torch.zeros(2, seq_len, dtype=torch.int64), cache=cache)
        job = Job(model=config, mode="prefill", seq_len=seq_len, batch_size=2)
        assert cache.nbytes == cache_bytes(job)
        model(torch.zeros(2, 1, dtype=torch.int64), cache=cache)
    assert cache.nbytes == cache_bytes(job.replace(mode="decoding"))


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("memory_len", [90, 300])
def test_caches_of_two_sequences_to_the_byte(num_kv_heads, memory_len):
    config = EncoderDecoderConfig(
        num_tokens=64, d_model=64, nhead=4, num_encoder_layers=1, num_decoder_layers=2,
        dim_feedforward=96, segment_lengths=(64, 256), dilation_rates=(1, 4),
        num_kv_heads=num_kv_heads,
    )  # fmt: skip
    model = LongNet(config).eval()
    cache = GenerationCache(model, memory=torch.zeros(2, memory_len, 64))
    job = Job(model=config, mode="prefill", seq_len=20, batch_size=2, memory_len=memory_len)
    before = sum(parameter.nbytes for parameter in model.parameters())
    with torch.no_grad():
        model.step(torch.zeros(2, 20, dtype=torch.int64), cache)
        assert cache.nbytes == cache_bytes(job)
        job = job.replace(mode="decoding")
        tokens = torch.zeros(2, 1, dtype=torch.int64)
        with memory_profile() as profile, FlopCounterMode(display=False) as counter:
            model.step(tokens, cache)
    assert cache.nbytes == cache_bytes(job)
    assert memory_of(job).total == pytest.approx(
        before + cache.nbytes + profile.peak_bytes, rel=0.2
    )
    planned = [x for x in operations_of(job, work_of(job)) if x.kind == "products"]
    assert sum(x.flops for x in planned) <= counter.get_total_flops()


@pytest.mark.exhaustive
@pytest.mark.parametrize("mode", ["forward", "prefill", "decoding"])
@pytest.mark.parametrize("num_kv_heads", [None, 1])
@pytest.mark.parametrize("kind", ["window", "block_sparse", "block_sparse_adaptive", "moba", "nsa"])
def test_inference_of_each_kind(config, kind, num_kv_heads, mode):
    change = (
        {"local_window": 16} if kind == "window" else {"attention_kind": kind, **WITHOUT_BRANCHES}
    )
    config = dataclasses.replace(config, num_kv_heads=num_kv_heads, **change)
    model = LongNetLM(config).eval()
    tokens = torch.zeros(1, 1500, dtype=torch.int64)
    cache = GenerationCache(model, 1) if mode != "forward" else None
    with torch.no_grad():
        model(tokens[:, :8])
        if mode == "decoding":
            model(tokens, cache=cache)
            model(tokens[:, :1], cache=cache)  # makes room
        with memory_profile() as profile:
            model(tokens[:, :1] if mode == "decoding" else tokens, cache=cache)
    before = sum(parameter.nbytes for parameter in model.parameters())
    if mode == "decoding":
        before += cache.nbytes
    job = Job(model=config, mode=mode, seq_len=1500)
    # The cache of a prompt grows while it is measured, and leaves its first room unused.
    assert memory_of(job).total == pytest.approx(before + profile.peak_bytes, rel=0.3)


def test_what_saves_memory(config):
    job = Job(model=config, seq_len=4096, batch_size=8, devices=8)
    whole = memory_of(job)
    assert set(whole.parts) >= {"parameters", "optimiser", "activations", "gradient buckets"}
    # As many parts more as ranks share a sequence, so that the batch is the same.
    assert memory_of(job.replace(cp=8, accumulation=8)).total < 0.3 * whole.total
    assert memory_of(job.replace(dtype="bfloat16")).total < 0.8 * whole.total
    vast = job.replace(model=dataclasses.replace(config, num_tokens=50_000))
    assert memory_of(vast).total < 0.5 * memory_of(vast.replace(chunked_loss=False)).total
    wide = dataclasses.replace(
        config, d_model=512, dim_feedforward=2048, num_decoder_layers=16, num_tokens=16
    )
    short = job.replace(model=wide, seq_len=16)
    assert memory_of(short.replace(fsdp=True)).total < 0.5 * memory_of(short).total
