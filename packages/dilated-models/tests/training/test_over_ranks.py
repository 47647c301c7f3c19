"""Training over dp × cp ranks is training on one process: losses, gradients, norms, weights.

Every rank holds the same first weights. One process trains on the whole batch; the ranks train on
rows (dp) and shards of the sequence (cp), with a length that no number of ranks divides. In
float64, so that only a wrong sum or factor can make a difference.
"""

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing.processes import run_processes
from dilated_models import ContextParallel, LongNetConfig, LongNetLM
from dilated_ring import check_same_batch, chunked_cross_entropy, shard_sequence, shift_sequence
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

ROWS, SEQ_LEN, RANKS = 4, 37, 4
TOLERANCE = 1e-9
CONFIG = LongNetConfig(
    num_tokens=31,
    d_model=16,
    nhead=4,
    num_decoder_layers=2,
    dim_feedforward=24,
    segment_lengths=(6, 16, 40),
    dilation_rates=(1, 3, 4),
    key_conv=3,
)


class WithLoss(nn.Module):
    """A model and its loss as one module: inside its forward, FSDP has gathered all weights."""

    def __init__(self, model: LongNetLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens, labels, context_parallel):
        hidden = self.model.hidden_states(tokens, context_parallel=context_parallel)
        weight = self.model.output.weight
        # Divided by the labels of all ranks, those of dp too.
        return chunked_cross_entropy(hidden, weight, labels, timeout_s=120.0)


class Step(NamedTuple):
    loss: torch.Tensor
    norm: torch.Tensor
    grads: list[torch.Tensor]


def made() -> LongNetLM:
    torch.manual_seed(0)
    return LongNetLM(CONFIG, dtype=torch.float64)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and where a label does not count: all of one rank's positions among them."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(CONFIG.num_tokens, (ROWS, SEQ_LEN), generator=generator)
    ignored = torch.rand(ROWS, SEQ_LEN, generator=generator) < 0.1
    ignored[: ROWS // 2, 10:19] = True  # what the second of four ranks holds
    ignored[ROWS - 1] = True  # what the last of four data-parallel ranks holds
    return tokens, ignored


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def train_alone(num_steps: int) -> tuple[list[Step], list[torch.Tensor]]:
    """Each step of one process, and the last weights."""
    model, steps = made(), []
    optimizer = optimizer_of(model)
    for number in range(num_steps):
        tokens, ignored = batch(number)
        labels = torch.cat((tokens[:, 1:], torch.full((ROWS, 1), -100)), 1)
        labels = labels.masked_fill(ignored, -100)
        loss = cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters()]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.append(Step(loss.detach(), norm, grads))
        optimizer.step()
        optimizer.zero_grad()
    return steps, [p.detach() for p in model.parameters()]


def distance(got: torch.Tensor, want: torch.Tensor, floor: float = 0.0) -> float:
    return float((whole(got) - want).abs().max() / max(float(want.abs().max()), floor))


def largest_difference(engine: str, mesh: DeviceMesh, layout: str, alone) -> float:
    steps, last = alone
    trained = made()
    parallel: nn.Module = WithLoss(trained)
    if engine == "ddp":
        parallel = DistributedDataParallel(parallel)
    elif engine == "fsdp":
        # Replicas over dp and shards over cp where there are both, otherwise shards over all.
        over = {"mesh": mesh} if mesh.size(0) > 1 < mesh.size(1) else {}
        for block in trained.blocks:
            fully_shard(block, **over)
        fully_shard(parallel, **over)
    # DDP and FSDP average over all ranks. The sum is needed, so the loss is multiplied by them.
    factor = 1 if engine == "by hand" else RANKS
    if engine == "fsdp" and mesh.size(0) == RANKS:  # or the average is switched off
        factor = 1
        for module in (parallel, *trained.blocks):
            module.set_gradient_divide_factor(1.0)
    optimizer = optimizer_of(parallel)
    rows = slice(mesh.get_local_rank("dp") * ROWS // mesh.size(0), None)
    rows = slice(rows.start, rows.start + ROWS // mesh.size(0))
    cp = {"group": mesh["cp"], "layout": layout, "timeout_s": 120.0}
    context_parallel = ContextParallel(**cp)
    worst = []
    for number, want in enumerate(steps):
        tokens, ignored = (x[rows] for x in batch(number))
        if number == 0:
            check_same_batch([tokens, ignored], mesh["cp"], timeout_s=120.0)
        local = shard_sequence(tokens, **cp)
        labels = shift_sequence(local, 1, fill=-100, **cp)
        labels = labels.masked_fill(shard_sequence(ignored, **cp), -100)
        loss = parallel(local, labels, context_parallel)
        (loss * factor).backward()
        if engine == "by hand":
            for p in trained.parameters():
                dist.all_reduce(p.grad)
        total = loss.detach().clone()
        dist.all_reduce(total)
        floor = 1e-6 * max(float(grad.abs().max()) for grad in want.grads)
        grads = [p.grad for p in trained.parameters()]
        worst += [distance(a, b, floor) for a, b in zip(grads, want.grads, strict=True)]
        norm = nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        worst += [distance(total, want.loss), distance(norm, want.norm)]
        optimizer.step()
        optimizer.zero_grad()
    worst += [distance(a.detach(), b) for a, b in zip(trained.parameters(), last, strict=True)]
    return max(worst)


def train_over_ranks(engine: str, meshes: list[tuple[int, int]], num_steps: int) -> list[float]:
    alone = train_alone(num_steps)
    found = []
    for shape in meshes:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "cp"))
        layout = "zigzag" if shape == (2, 2) else "contiguous"
        found.append(largest_difference(engine, mesh, layout, alone))
    return found


@pytest.mark.parametrize("engine", ["by hand", "ddp", "fsdp"])
@pytest.mark.parametrize(
    ("meshes", "num_steps"),
    [
        pytest.param([(2, 2)], 4, id="one mesh"),
        pytest.param([(1, 4), (2, 2), (4, 1)], 20, id="all meshes", marks=pytest.mark.exhaustive),
    ],
)
def test_training_over_ranks_is_training_alone(engine, meshes, num_steps):
    ranks = run_processes(train_over_ranks, RANKS, engine, meshes, num_steps, timeout_s=500)
    for found in ranks:
        assert max(found) < TOLERANCE, dict(zip(meshes, found, strict=True))
