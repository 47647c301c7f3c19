"""Train a LongNet on sequences that are cut over processes; a killed process loses no work.

    torchrun --standalone --nproc-per-node 2 packages/dilated-ring/examples/train_longnet.py

Each process holds its part of every sequence and a copy of the model. With `--checkpoints FOLDER`,
and `--max-restarts 3` of torchrun, a process that dies is started again together with the others:
they continue from the last checkpoint, on the CPU to the same bits as if nothing had happened.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dilated_models import ContextParallel, LongNetLM
from dilated_ring import check_same_batch, chunked_cross_entropy, shard_sequence, shift_sequence
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def draw_batch(step: int, seq_len: int) -> torch.Tensor:
    """`(1, S)` bytes of Python's own argparse module, the same on all processes."""
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(step)  # so that a continued run draws the same
    start = int(torch.randint(len(text) - seq_len, (), generator=generator))
    return text[None, start : start + seq_len].long()


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a checkpoint, which has its name only once all processes have written their part."""
    weights, moments = get_state_dict(model, optimizer)
    unfinished = folder / "unfinished"
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=unfinished)
    dist.barrier()
    if dist.get_rank() == 0:
        unfinished.rename(folder / f"step_{step:06}")
    dist.barrier()


def load(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the last checkpoint; the steps done, 0 if there is none."""
    found = sorted(folder.glob("step_*"))
    if not found:
        return 0
    weights, moments = get_state_dict(model, optimizer)
    dcp.load({"model": weights, "optimizer": moments}, checkpoint_id=found[-1])
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    return int(found[-1].name.removeprefix("step_"))


def train(options: argparse.Namespace, device: torch.device) -> None:
    """Train on this process' shards."""
    torch.manual_seed(0)  # the same first weights on all processes
    model = LongNetLM(
        num_tokens=256,
        d_model=64,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=128,
        segment_lengths=[64, 256, 1024],
        dilation_rates=[1, 2, 4],
        device=device,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # "zigzag" gives each process an early and a late part, and so the same amount of work.
    layout = "zigzag"
    context_parallel = ContextParallel(layout=layout)
    done = load(options.checkpoints, model, optimizer) if options.checkpoints else 0
    print(f"rank {dist.get_rank()} is process {os.getpid()}; {done} steps are done", flush=True)
    for step in range(done, options.steps):
        tokens = draw_batch(step, options.seq_len).to(device)
        if step == done:
            check_same_batch(tokens)
        local = shard_sequence(tokens, layout=layout)
        labels = shift_sequence(local, 1, fill=-100, layout=layout)
        hidden = model.hidden_states(local, context_parallel=context_parallel)
        # This process' share of the loss: the sum over its tokens, divided by all tokens.
        loss = chunked_cross_entropy(hidden, model.output.weight, labels)
        loss.backward()
        # Shares add up, and so do their gradients. DDP and FSDP would average over the processes,
        # so with them multiply the loss by the number of processes.
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss := loss.detach())
        if dist.get_rank() == 0:
            print(f"step {step + 1} of {options.steps}: loss {loss:.4f}", flush=True)
        if options.checkpoints and (step + 1) % options.every == 0:
            save(options.checkpoints, step + 1, model, optimizer)
    if options.weights and dist.get_rank() == 0:
        torch.save(model.state_dict(), options.weights)


def main() -> None:
    """Start the process group, on GPUs if each process has one, and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=2048, help="of all processes together")
    parser.add_argument("--checkpoints", type=Path, help="folder to write to and continue from")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--weights", type=Path, help="file for the last weights")
    options = parser.parse_args()
    if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    store, rank, world_size = next(dist.rendezvous("env://"))
    # torchrun keeps its store over a restart, and with it the addresses of processes that ended.
    store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    try:
        train(options, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
