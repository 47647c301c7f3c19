"""Plans against measurements: peak memory and time of steps, each in a process of its own.

`python benchmarks/plan_check.py` measures this machine, then a grid of models on it, and writes
results/plan_check.json. On the CPU there is one thread. Its time is the time that the process
computes, so what other processes take does not count, but they still slow down memory. Memory is
resident memory above that of the interpreter with its libraries, measured in two processes: one in
which glibc returns every large block at once (`MALLOC_MMAP_THRESHOLD_`), so that only tensors
count, and one as users start it, in which freed blocks leave holes. `--device cuda` measures a GPU:
memory of PyTorch's allocator, and wall time of synchronised steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.planning.calibration import calibrate
from dilated_models.planning.hardware import Hardware
from dilated_models.planning.job import Job
from dilated_models.planning.plan import Plan, plan_job
from harness import (
    high_water_bytes,
    peak_memory_in_fresh_process,
    reset_high_water,
    write_result,
)
from torch import nn
from torch.nn.functional import cross_entropy

RESULT = Path(__file__).parent / "results" / "plan_check.json"
STEPS = 3  # after one that warms up
BASE: dict[str, Any] = {
    "num_tokens": 256, "d_model": 256, "nhead": 4, "num_decoder_layers": 4,
    "dim_feedforward": 1024, "segment_lengths": [512, 2048], "dilation_rates": [1, 4],
}  # fmt: skip
# Changes of the model, and of the job.
GRID: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("base", {}, {}),
    ("gelu", {"activation": "gelu"}, {}),
    ("blocks recomputed", {"activation_checkpointing": True}, {}),
    ("convolution", {"key_conv": 4}, {}),
    ("dropout", {"dropout": 0.1}, {}),
    ("vocabulary of 32,768", {"num_tokens": 32_768}, {}),
    ("whole logits, 8,192", {"num_tokens": 8192}, {"chunked_loss": False}),
    ("width of 512", {"d_model": 512, "nhead": 8, "dim_feedforward": 2048}, {}),
    ("8 layers of 128", {"d_model": 128, "dim_feedforward": 512, "num_decoder_layers": 8}, {}),
    ("dense", {"segment_lengths": [4096], "dilation_rates": [1]}, {}),
    ("five branches", {"segment_lengths": [256, 512, 1024, 2048, 4096],
                       "dilation_rates": [1, 2, 4, 6, 12]}, {}),
    ("short rows", {}, {"seq_len": 256, "batch_size": 16}),
    ("in two parts", {}, {"batch_size": 2, "accumulation": 2}),
    ("forward", {}, {"mode": "forward", "seq_len": 16_384}),
]  # fmt: skip
ON_GPU: dict[str, Any] = {
    "d_model": 1024, "nhead": 16, "dim_feedforward": 4096, "num_decoder_layers": 12,
}  # fmt: skip


def job_of(model: dict[str, Any], options: dict[str, Any], *, is_gpu: bool) -> Job:
    """A job of the grid; larger models in bfloat16 for a GPU."""
    defaults: dict[str, Any] = {"seq_len": 4096, "batch_size": 1}
    fields = BASE | model
    if is_gpu:
        fields = BASE | ON_GPU | model
        defaults |= {"seq_len": 16_384, "dtype": "bfloat16", "on_gpu": True}
    return Job(model=LongNetConfig(**fields), **(defaults | options))


def plan_of(number: int, hardware: Hardware, *, is_gpu: bool) -> Plan:
    """The plan of a row of the grid."""
    _, model, options = GRID[number]
    return plan_job(job_of(model, options, is_gpu=is_gpu), hardware, with_change=False)


def step_of(job: Job, device: torch.device) -> Callable[[], object]:
    """A model on a device, and a function that runs a step of the job."""
    torch.manual_seed(0)
    if job.mode == "training":
        return _training_step(job, device)
    model = LongNetLM(job.model, device=device, dtype=getattr(torch, job.dtype)).eval()
    tokens = torch.zeros(job.rows, job.seq_len, dtype=torch.int64, device=device)
    return torch.no_grad()(lambda: model(tokens))


def _training_step(job: Job, device: torch.device) -> Callable[[], object]:
    model = LongNetLM(job.model, device=device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(job.tokens, dtype=torch.int64, device=device)
    bounds = torch.arange(job.rows + 1) * job.seq_len

    def loss() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=job.is_autocast):
            if job.chunked_loss:
                return model.loss(tokens, tokens, cu_seqlens=bounds)
            logits = model(tokens, cu_seqlens=bounds)
        return cross_entropy(logits.float(), tokens)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        for _ in range(job.accumulation):
            loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def measure(job: Job, device: torch.device, *, steps: int) -> dict[str, float]:
    """Peak bytes and the median seconds of steps after the first; in a process of its own."""
    # Loads kernels and libraries, whose memory is not the model's.
    small = dataclasses.replace(
        job.model, d_model=32, nhead=2, num_decoder_layers=1, dim_feedforward=32, num_tokens=16
    )
    step_of(job.replace(model=small, seq_len=64), device)()
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_high_water()
    before = 0 if is_gpu else high_water_bytes()
    step = step_of(job, device)
    clock = time.perf_counter if is_gpu else time.process_time
    times: list[float] = []
    for _ in range(1 + steps):
        if is_gpu:
            torch.cuda.synchronize()
        begin = clock()
        step()
        if is_gpu:
            torch.cuda.synchronize()
        times.append(clock() - begin)
    peak = torch.cuda.max_memory_allocated() if is_gpu else high_water_bytes() - before
    return {"bytes": peak, "seconds": statistics.median(times[1:])}


def row_of(
    number: int, plan: Plan, measured: dict[str, float], without_holes: float
) -> dict[str, Any]:
    """What was planned and measured, and their ratios."""
    job = plan.job
    return {
        "name": GRID[number][0],
        "model": job.model.to_dict(),
        "job": {name: getattr(job, name) for name in Job.__slots__ if name != "model"},
        "planned_bytes": plan.memory.total,
        "measured_bytes": without_holes,
        "resident_bytes": measured["bytes"],
        "bytes_ratio": round(plan.memory.total / without_holes, 3),
        "planned_seconds": plan.seconds.total,
        "measured_seconds": measured["seconds"],
        "seconds_ratio": round(plan.seconds.total / measured["seconds"], 3),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", type=int, help="measure this row only, and print it as JSON")
    parser.add_argument("--steps", type=int, default=STEPS, help="timed in each process")
    parser.add_argument("--rows", type=int, nargs="*", help="of the grid; all if left out")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    is_gpu = device.type == "cuda"
    torch.set_num_threads(1)
    if is_gpu and not torch.cuda.is_available():
        print("there is no GPU here; nothing was measured")
        return
    if options.one is not None:
        _, model, fields = GRID[options.one]
        job = job_of(model, fields, is_gpu=is_gpu)
        print(json.dumps(measure(job, device, steps=options.steps)))
        return
    clock = time.perf_counter if is_gpu else time.process_time
    dtypes = ("float32", "bfloat16") if is_gpu else ("float32",)
    hardware = calibrate(device, dtypes=dtypes, clock=clock)
    rows: list[dict[str, Any]] = []
    for number in range(len(GRID)) if options.rows is None else options.rows:
        plan = plan_of(number, hardware, is_gpu=is_gpu)
        command = ("plan_check.py", "--one", str(number), "--device", options.device)
        os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"
        without_holes = peak_memory_in_fresh_process(*command, "--steps", "1")["bytes"]
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        measured = peak_memory_in_fresh_process(*command, "--steps", str(options.steps))
        rows.append(row_of(number, plan, measured, without_holes))
        row = rows[-1]
        print(
            f"{row['name']:<22} {row['measured_bytes'] / 1e6:8.0f} MB, planned "
            f"× {row['bytes_ratio']:.2f};  {row['measured_seconds']:8.3f} s, planned "
            f"× {row['seconds_ratio']:.2f}",
            flush=True,
        )
    out = options.out or (RESULT.with_stem("plan_check_gpu") if is_gpu else RESULT)
    rows[0]["hardware"] = json.loads(hardware.to_json())
    write_result(out, "plan_check", rows)


if __name__ == "__main__":
    main()
