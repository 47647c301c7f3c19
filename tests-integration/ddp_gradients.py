"""Data-parallel training of dilated attention has the gradients of a single process.

Run under torchrun (`nox -s multigpu`). Every rank holds the same model and a part of the batch;
after the backward pass every rank compares every parameter's gradient with that of one process
that sees the whole batch. In float64, so that only a wrong sum can make a difference.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from dilated_core import MultiheadDilatedAttention
from over_ranks import run
from torch.nn.parallel import DistributedDataParallel

SEQUENCES_PER_RANK, SEQ_LEN, EMBED_DIM, NUM_HEADS = 2, 96, 32, 4
TOLERANCE = 1e-12
"""The sums differ in their order only, which costs a few times 1e-16."""


class Residual(torch.nn.Module):
    """Two attention layers, so that a gradient flows through attention too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            MultiheadDilatedAttention(
                EMBED_DIM,
                NUM_HEADS,
                segment_lengths=[16, 32, 64],
                dilation_rates=[1, 2, 4],
                dtype=torch.float64,
            )
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, S, E)` to `(B, S, E)`."""
        for layer in self.layers:
            x = x + layer(x, x, x, is_causal=True)
        return x


def compare(device: torch.device, rank: int, world_size: int) -> float:
    """The largest difference of a gradient on this rank, relative to the largest gradient."""
    torch.manual_seed(0)  # the same model and the same batch on every rank
    model = Residual().to(device)
    alone = Residual().to(device)
    alone.load_state_dict(model.state_dict())
    shape = (world_size * SEQUENCES_PER_RANK, SEQ_LEN, EMBED_DIM)
    batch, target = (torch.randn(shape, dtype=torch.float64).to(device) for _ in range(2))

    own = slice(rank * SEQUENCES_PER_RANK, (rank + 1) * SEQUENCES_PER_RANK)
    parallel = DistributedDataParallel(model)
    torch.nn.functional.mse_loss(parallel(batch[own]), target[own]).backward()
    torch.nn.functional.mse_loss(alone(batch), target).backward()

    names = [name for name, _ in model.named_parameters()]
    got, want = ([parameter.grad for parameter in m.parameters()] for m in (model, alone))
    missing = [
        name
        for name, *grads in zip(names, got, want, strict=True)
        if any(grad is None for grad in grads)
    ]
    if missing:
        raise SystemExit(f"rank {rank}: no gradient for {', '.join(missing)}")
    # One scale for all: the exact gradient of the key bias is 0, and nothing is relative to that.
    scale = max(float(grad.abs().max()) for grad in want)
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True)) / scale


def differences(device: torch.device) -> Iterator[tuple[str, float]]:
    """Of all gradients."""
    yield "gradients", compare(device, dist.get_rank(), dist.get_world_size())


if __name__ == "__main__":
    run(__doc__, differences, tolerance=TOLERANCE)
