"""Data-parallel training of dilated attention has the gradients of a single process.

Run under torchrun (`nox -s multigpu`). Every rank holds the same model and a part of the batch;
after the backward pass every rank compares every parameter's gradient with that of one process
that sees the whole batch. In float64, so that only a wrong sum can make a difference.
"""

import argparse
import os

import torch
import torch.distributed as dist
from dilated_core import MultiheadDilatedAttention
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


def main() -> None:
    """Compare on every rank; one rank that differs fails the run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=["gloo", "nccl"], required=True)
    backend = parser.parse_args().backend
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(1)
    dist.init_process_group(backend)
    try:
        worst = compare(device, rank, world_size)
        if not worst <= TOLERANCE:
            raise SystemExit(f"rank {rank}: gradients differ by {worst:.1e}, at most {TOLERANCE}")
        dist.barrier()  # rank 0 speaks for all only once all have compared
        if rank == 0:
            print(f"{world_size} ranks over {backend}: same gradients within {TOLERANCE}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
