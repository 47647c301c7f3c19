"""DeepSpeed beside sequences that are cut over ranks: ZeRO, and the heads of Ulysses.

It needs the extra `deepspeed`, which no session of nox installs, and takes a minute:

    uv run --all-packages --extra deepspeed python -m pytest -m slow \
        packages/dilated-ring/tests/training/test_deepspeed.py
"""

import os
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from dilated_core import DilatedPattern, dilated_attention
from dilated_core.testing.processes import run_processes
from dilated_ring import (
    chunked_cross_entropy,
    ring_dilated_attention,
    shard_sequence,
    shift_sequence,
)
from torch import nn
from torch.nn.functional import cross_entropy

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # Not importorskip: the import takes seconds, and pytest imports this file to leave it out, too.
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs the extra deepspeed"),
]

STEPS, ROWS, SEQ_LEN, HEADS, RANKS, TOKENS, DIM = 6, 2, 37, 4, 2, 23, 32
STAGES = (1, 2, 3)
TOLERANCE = 1e-5
PATTERN = DilatedPattern(segment_lengths=[6, 16, 40], dilation_rates=[1, 2, 4])


class Model(nn.Module):
    """Embedding, causal dilated attention with a residual, output layer, loss.

    On one process `cut` is False, and everything is done with PyTorch and dilated-core.
    """

    def __init__(self, *, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.embed = nn.Embedding(TOKENS, DIM)
        self.project = nn.Linear(DIM, 3 * DIM)
        self.merge = nn.Linear(DIM, DIM)
        self.head = nn.Linear(DIM, TOKENS, bias=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).unbind(-3)
        attend = ring_dilated_attention if self.cut else dilated_attention
        x = x + self.merge(attend(q, k, v, PATTERN, is_causal=True).flatten(-2))
        if self.cut:  # this rank's share of the mean over the labels of all ranks
            return chunked_cross_entropy(x, self.head.weight, labels)
        return cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


class Training(NamedTuple):
    losses: list[float]
    norms: list[float]
    weights: list[torch.Tensor]


def made(*, cut: bool) -> tuple[Model, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Model(cut=cut)
    # Its steps are as long as the gradients; Adam would hide a factor in them.
    return model, torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def batch(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(TOKENS, (ROWS, SEQ_LEN), generator=generator)


def train_alone() -> Training:
    model, optimizer = made(cut=False)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = batch(step)
        labels = torch.cat((tokens[:, 1:], torch.full((ROWS, 1), -100)), 1)
        loss = model(tokens, labels)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return Training(losses, norms, [p.detach() for p in model.parameters()])


def import_deepspeed(folder: str):
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": folder,
        "OMP_NUM_THREADS": "1",
        "RANK": str(dist.get_rank()),
        "LOCAL_RANK": str(dist.get_rank()),
        "WORLD_SIZE": str(dist.get_world_size()),
    }
    import deepspeed

    # DeepSpeed would compile collectives of its own for the CPU, for a minute. Use those of gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    return deepspeed


def train_over_ranks(folder: str, stage: int, factor: int) -> Training:
    deepspeed = import_deepspeed(folder)
    model, optimizer = made(cut=True)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": RANKS,  # which DeepSpeed takes for the number of different batches
            "train_micro_batch_size_per_gpu": 1,
            "gradient_clipping": 0.5,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    losses, norms = [], []
    for step in range(STEPS):
        tokens = shard_sequence(batch(step))
        share = engine(tokens, shift_sequence(tokens, 1, fill=-100))
        engine.backward(share * factor)
        engine.step()
        loss = share.detach().clone()
        dist.all_reduce(loss)
        losses.append(float(loss))
        norms.append(float(engine.get_global_grad_norm()))
    weights = []
    for p in model.parameters():
        with deepspeed.zero.GatheredParameters([p], enabled=stage == 3):
            weights.append(p.detach().clone())
    return Training(losses, norms, weights)


def train_all_stages(folder: str) -> list[tuple]:
    runs = [(stage, RANKS) for stage in STAGES] + [(1, 1)]
    return [tuple(train_over_ranks(folder, *run)) for run in runs]


def attend_like_ulysses(folder: str) -> dict[str, list[list[float]]]:
    """Distances of result, dq, dk and dv at this rank's positions from those of one device."""
    import_deepspeed(folder)
    from deepspeed.sequence.layer import DistributedAttention

    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, 36, HEADS, 8)  # DeepSpeed needs shards of equal lengths
    q, k, v, dout = (torch.randn(shape, generator=generator) for _ in range(4))
    k, v = (x[:, :, :2] for x in (k, v))  # grouped: each rank gets one head of k and v, two of q
    whole = [x.clone().requires_grad_() for x in (q, k, v)]
    out = dilated_attention(*whole, PATTERN, is_causal=True)
    want = (out.detach(), *torch.autograd.grad(out, whole, dout))

    attention = DistributedAttention(dilated_attention, dist.group.WORLD, 2, 1)
    first = dist.get_rank() * HEADS // dist.get_world_size()
    found = {}
    for name, option in (("with", {"head_range": (first, HEADS)}), ("without", {})):
        local = [shard_sequence(x).requires_grad_() for x in (q, k, v)]
        out = attention(*local, 0, None, PATTERN, is_causal=True, **option)
        got = (out.detach(), *torch.autograd.grad(out, local, shard_sequence(dout)))
        exact = [shard_sequence(x) for x in want]
        errors = [(a - b).abs() for a, b in zip(got, exact, strict=True)]
        # One number for the heads that the first rank attended with, one for the second's.
        found[name] = [[float(half.max()) for half in error.chunk(2, 2)] for error in errors]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("extensions"))


def test_zero_over_shards_of_a_sequence_is_training_alone(folder):
    want = train_alone()
    for rank in run_processes(train_all_stages, RANKS, folder, timeout_s=500):
        *stages, averaged = (Training(*run) for run in rank)
        for stage, got in zip(STAGES, stages, strict=True):
            assert got.losses == pytest.approx(want.losses, rel=TOLERANCE), stage
            assert got.norms == pytest.approx(want.norms, rel=TOLERANCE), stage
            for a, b in zip(got.weights, want.weights, strict=True):
                torch.testing.assert_close(a, b, rtol=TOLERANCE, atol=TOLERANCE)
        # Without the factor, DeepSpeed's mean over the ranks is a half of the gradient.
        assert averaged.norms[0] == pytest.approx(want.norms[0] / RANKS, rel=TOLERANCE)


def test_ulysses_attends_as_one_device_if_it_gets_the_range_of_heads(folder):
    for rank in run_processes(attend_like_ulysses, RANKS, folder, timeout_s=500):
        assert max(max(halves) for halves in rank["with"]) < TOLERANCE
        # Without it, the second rank's heads get the offsets of the first rank's.
        for first_heads, second_heads in rank["without"]:
            assert first_heads < TOLERANCE
            assert second_heads > 0.01
