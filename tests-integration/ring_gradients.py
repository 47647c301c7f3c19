"""Attention over ranks has the results and gradients of attention over the whole sequence.

Run under torchrun (`nox -s multigpu`). Every rank holds the whole sequence and its own shard; it
compares the shard's result and gradients with those of the whole, for each layout and exchange, and
the logits of a model with those of the whole model. In float64, so that only a wrong row can make a
difference.
"""

import argparse
import os

import torch
import torch.distributed as dist
from dilated_core import DilatedPattern, dilated_attention
from dilated_models import ContextParallel, LongNetLM
from dilated_ring import ring_dilated_attention, shard_sequence

PATTERN = DilatedPattern([16, 60, 400], [1, 3, 8])
SEQ_LEN, NUM_HEADS = 203, 8
TOLERANCE = 1e-10


def compare_attention(device: torch.device, layout: str, exchange: str) -> float:
    """The largest difference on this rank."""
    torch.manual_seed(0)
    shape = (2, SEQ_LEN, NUM_HEADS, 16)
    q, k, v, upstream = (torch.randn(shape, dtype=torch.float64).to(device) for _ in range(4))
    local = [shard_sequence(x, layout=layout).requires_grad_() for x in (q, k, v)]
    out = ring_dilated_attention(*local, PATTERN, is_causal=True, layout=layout, exchange=exchange)
    got = torch.autograd.grad(out, local, shard_sequence(upstream, layout=layout))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    whole = dilated_attention(*inputs, PATTERN, is_causal=True)
    want = torch.autograd.grad(whole, inputs, upstream)
    pairs = zip((out, *got), (whole, *want), strict=True)
    return max(_distance(a, shard_sequence(b, layout=layout)) for a, b in pairs)


def compare_model(device: torch.device, layout: str) -> float:
    """The largest difference of a logit on this rank."""
    torch.manual_seed(0)
    model = LongNetLM(
        num_tokens=50, d_model=64, nhead=NUM_HEADS, num_decoder_layers=2, dim_feedforward=64,
        segment_lengths=[16, 60, 400], dilation_rates=[1, 3, 8], key_conv=4, dtype=torch.float64,
    ).to(device)  # fmt: skip
    tokens = torch.randint(50, (2, SEQ_LEN)).to(device)
    logits = model(
        shard_sequence(tokens, layout=layout), context_parallel=ContextParallel(layout=layout)
    )
    return _distance(logits, shard_sequence(model(tokens), layout=layout))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max())


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
        for layout in ("contiguous", "zigzag"):
            found = {"the model": compare_model(device, layout)}
            # Each rank needs a head of its own for all_to_all.
            exchanges = ["auto", "ring", "all_gather", "all_to_all"]
            for exchange in exchanges if world_size <= NUM_HEADS else exchanges[:3]:
                found[exchange] = compare_attention(device, layout, exchange)
            for name, worst in found.items():
                if not worst <= TOLERANCE:
                    raise SystemExit(f"rank {rank}: {layout}, {name}: differs by {worst:.1e}")
        dist.barrier()  # rank 0 speaks for all only once all have compared
        if rank == 0:
            print(f"{world_size} ranks over {backend}: same attention within {TOLERANCE}")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
