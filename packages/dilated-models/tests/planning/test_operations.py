"""Planned FLOPs against PyTorch's counter; bytes of the ring against its own plan."""

import dataclasses

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_models import GenerationCache, LongNetConfig, LongNetLM
from dilated_models.planning.attention import work_of
from dilated_models.planning.job import Job
from dilated_models.planning.operations import operations_of
from dilated_models.planning.traffic import sent_by_rank
from dilated_ring import exchange_plan
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

DEFAULT = LongNetConfig(num_tokens=1)
WITHOUT_BRANCHES = {
    "segment_lengths": DEFAULT.segment_lengths,
    "dilation_rates": DEFAULT.dilation_rates,
}


def flops(job: Job) -> float:
    return sum(x.flops for x in operations_of(job, work_of(job)))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"key_conv": 2, "activation_checkpointing": True},
        {"num_encoder_layers": 1, "num_kv_heads": 2},
        {"positions": "alibi"},
    ],
    ids=str,
)
def test_flops_are_those_that_pytorch_counts(config, training_of, change):
    model = dataclasses.replace(config, segment_lengths=(60, 100), dilation_rates=(1, 3), **change)
    job = Job(model=model, seq_len=130, batch_size=4, accumulation=2)
    training = training_of(job)
    with FlopCounterMode(display=False) as counter:
        training.step(optimizer=False)
    assert flops(job) == counter.get_total_flops()
    forward = Job(model=model, seq_len=130, batch_size=2, mode="forward")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        training.model(torch.zeros(2, 130, dtype=torch.int64))
    assert flops(forward) == counter.get_total_flops()


NSA = {
    "compression_block_size": 16, "compression_stride": 8, "selection_block_size": 16,
    "num_selected_blocks": 4, "window_size": 32,
}  # fmt: skip
KINDS = {
    "ring": ({"attention_kind": "ring"}, {}),
    "window": ({"local_window": 20}, {}),
    "block_sparse": ({}, {"block_size": 32, "sparsity_ratio": 0.3}),
    "sinks": ({}, {"block_size": 32, "sparsity_ratio": 0.3, "pattern_type": "global_local"}),
    "block_sparse_adaptive": ({}, {"block_size": 32, "sparsity_ratio": 0.3}),
    "adaptive, number": ({}, {"block_size": 32, "topk": 4, "distillation": "none"}),
    "adaptive, all": ({}, {"block_size": 24, "topk": 4, "distillation": "all"}),
    "adaptive, bias": ({}, {"block_size": 32, "topk": 4, "gate_gradient": "bias"}),
    "moba": ({}, {"block_size": 32, "topk": 3}),
    "nsa": ({}, NSA),
    "nsa, one softmax": ({}, NSA | {"mix": "lse"}),
}


def of_kind(config: LongNetConfig, name: str, **change) -> LongNetConfig:
    fields, options = KINDS[name]
    if not fields:
        kind = "block_sparse" if name == "sinks" else name.split(",")[0]
        kind = kind if kind != "adaptive" else "block_sparse_adaptive"
        fields = {"attention_kind": kind, "attention_options": options, **WITHOUT_BRANCHES}
    return dataclasses.replace(config, **fields, **change)


@pytest.mark.parametrize("num_kv_heads", [None, pytest.param(2, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "name",
    [x if x in ("window", "nsa") else pytest.param(x, marks=pytest.mark.exhaustive) for x in KINDS],
)
def test_flops_of_each_kind_are_those_that_pytorch_counts(config, training_of, name, num_kv_heads):
    model = of_kind(config, name, num_kv_heads=num_kv_heads, num_decoder_layers=1)
    job = Job(model=model, seq_len=130, batch_size=2)
    training = training_of(job)
    with FlopCounterMode(display=False) as counter:
        training.step(optimizer=False)
    assert flops(job) == counter.get_total_flops()
    forward = Job(model=model, seq_len=301, batch_size=2, mode="forward")
    training.model.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        training.model(torch.zeros(2, 301, dtype=torch.int64))
    assert flops(forward) == counter.get_total_flops()


def attention_flops(model: LongNetConfig, seq_len: int, batch_size: int = 1) -> float:
    return work_of(Job(model=model, seq_len=seq_len, batch_size=batch_size)).flops


@pytest.mark.parametrize("seq_len", [1, 63, 64, 300, 1000])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_pairs_of_blocks(config, seq_len, ratio):
    from dilated_sparse import SparsePatternConfig

    options = {"sparsity_ratio": ratio, "block_size": 32}
    model = dataclasses.replace(
        config, attention_kind="block_sparse", attention_options=options, **WITHOUT_BRANCHES
    )
    pattern = SparsePatternConfig(**options).pattern_for(seq_len, is_causal=True)
    blocks = pattern.materialize(num_heads=1)[0]
    mask = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[:seq_len, :seq_len].tril()
    assert attention_flops(model, seq_len) == 4 * model.d_model * int(mask.sum())


@pytest.mark.parametrize("seq_len", [1, 63, 64, 300])
def test_pairs_of_moba(config, seq_len):
    options = {"block_size": 32, "topk": 3}
    model = dataclasses.replace(
        config, attention_kind="moba", attention_options=options, **WITHOUT_BRANCHES
    )
    pairs = 0
    for i in range(seq_len):
        block, inside = divmod(i, 32)
        pairs += inside + 1 + 32 * min(2, block)
    assert attention_flops(model, seq_len) == 4 * model.d_model * pairs


def test_pairs_of_a_window(config):
    windowed = dataclasses.replace(config, local_window=10)
    i = torch.arange(50)
    near = (i[:, None] - i < 10) & (i <= i[:, None])
    seen = near.repeat(4, 1, 1).int()
    for w, r in windowed.pattern.branches:
        alone = DilatedPattern([w], [r]).materialize(50, 4).tril().bool()
        seen += (alone & ~near).int()
    assert attention_flops(windowed, 50) == 4 * windowed.head_dim * int(seen.sum())


def test_a_billion_tokens_of_each_kind_are_planned(config):
    for name in KINDS:
        model = of_kind(config, name)
        for mode in ("training", "decoding"):
            if mode == "training" or name != "adaptive, bias":
                assert flops(Job(model=model, seq_len=10**9, mode=mode)) > 1e5


class Operations(TorchDispatchMode):
    """How many operations PyTorch runs."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_branches", [1, 2, 5])
@pytest.mark.parametrize("num_decoder_layers", [1, 3])
def test_operations_of_decoding(config, num_branches, num_decoder_layers):
    config = dataclasses.replace(
        config, num_decoder_layers=num_decoder_layers,
        segment_lengths=[16, 32, 64, 128, 256][:num_branches],
        dilation_rates=[1, 2, 4, 6, 12][:num_branches],
    )  # fmt: skip
    model = LongNetLM(config).eval()
    cache = GenerationCache(model)
    with torch.no_grad():
        model(torch.zeros(1, 300, dtype=torch.int64), cache=cache)
        with Operations() as operations:
            model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)
    job = Job(model=config, seq_len=300, mode="decoding")
    planned = sum(x.num_operations for x in operations_of(job, work_of(job)))
    assert planned == pytest.approx(operations.count, rel=0.2)


@pytest.mark.parametrize("exchange", ["auto", "ring", "all_gather", "all_to_all"])
def test_bytes_over_ranks_are_those_of_the_exchange_plan(config, exchange):
    job = Job(
        model=config, seq_len=1000, batch_size=6, devices=4, cp=4, accumulation=3,
        exchange=exchange, dtype="bfloat16",
    )  # fmt: skip
    plan = exchange_plan(
        DilatedPattern(config.segment_lengths, config.dilation_rates), 1000, 4,
        exchange=exchange, num_heads=4, head_dim=16, batch_size=2, is_causal=True,
    )  # fmt: skip
    forward = max(rank.forward_bytes for rank in plan.ranks)
    backward = max(rank.backward_bytes for rank in plan.ranks)
    sent = {x.name: x.bytes for x in sent_by_rank(job, work_of(job))}
    layers_and_parts = 2 * 3
    assert forward > 0
    assert sent["keys and values of shared sequences"] == layers_and_parts * (forward + backward)
    recomputed = dataclasses.replace(config, activation_checkpointing=True)
    job = job.replace(model=recomputed)
    sent = {x.name: x.bytes for x in sent_by_rank(job, work_of(job))}
    assert sent["keys and values of shared sequences"] == layers_and_parts * (
        2 * forward + backward
    )
    # The rank with most FLOPs, of each branch its share.
    most = max(rank.forward_flops for rank in plan.ranks)
    assert work_of(job).flops == pytest.approx(most)


def test_bytes_of_parameters():
    model = LongNetConfig(num_tokens=1000, d_model=64, nhead=4, num_decoder_layers=3)
    job = Job(model=model, seq_len=64, batch_size=8, devices=8)
    from dilated_models.longnet.size import count_parameters

    size = 4 * count_parameters(model).total
    (replicas,) = sent_by_rank(job, work_of(job))
    assert replicas.bytes == pytest.approx(2 * size * 7 / 8)  # a ring of sums, and back
    (shards,) = sent_by_rank(job.replace(fsdp=True), work_of(job))
    assert shards.bytes == pytest.approx(3 * size * 7 / 8)
    forward = Job(model=model, seq_len=64, batch_size=8, devices=8, mode="forward")
    assert sent_by_rank(forward, work_of(forward)) == []
