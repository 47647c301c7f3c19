"""The frame of a comparison that torchrun starts: a process group, a device, and one verdict."""

import argparse
import os
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist


def run(
    description: str | None,
    compare: Callable[[torch.device], Iterator[tuple[str, float]]],
    *,
    tolerance: float,
) -> None:
    """Compare on every rank; one rank that differs fails the run.

    Args:
        description: Of the script, for its help.
        compare: Gives names and differences, the same names in the same order on every rank.
        tolerance: The largest difference that passes.
    """
    parser = argparse.ArgumentParser(description=description)
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
        for name, worst in compare(device):
            if not worst <= tolerance:
                raise SystemExit(f"rank {rank}: {name} differ by {worst:.1e}, above {tolerance}")
        dist.barrier()  # rank 0 speaks for all only once all have compared
        if rank == 0:
            print(f"{world_size} ranks over {backend}: the same within {tolerance}")
    finally:
        dist.destroy_process_group()
