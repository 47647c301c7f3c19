"""Run a function on several ranks, each a process of its own, and see every rank's error."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A rank that fails leaves the others waiting for it; they get this long to fail, too.
_GRACE_S = 5.0


def run_processes(
    function: Callable[..., Any], num_processes: int, *args: Any, timeout_s: float = 120.0
) -> list[Any]:
    """Call `function(*args)` on `num_processes` gloo ranks and return their results by rank.

    Inside, `torch.distributed` is initialised and each rank computes with one thread. Processes
    come from a fork server that has torch loaded already, so that a call takes a fraction of a
    second; a plain fork would hang if the caller had used OpenMP.

    Args:
        function: A function at the top level of its file, which the processes load by path.
        num_processes: World size.
        *args: Picklable arguments.
        timeout_s: Seconds until ranks that still run are ended.

    Returns:
        What each rank returned: tensors, numbers, strings, and containers of them.

    Raises:
        RuntimeError: If a rank raised, died or ran out of time, with the traceback of each.
    """
    context = get_context("forkserver")
    # Each process imports what the fork server has not: this package takes most of a second, and
    # torch._dynamo, which DistributedDataParallel and FSDP import, five seconds.
    ours = [name for name in sys.modules if name.startswith("dilated_")]
    context.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", *ours])
    with tempfile.TemporaryDirectory() as folder:
        target = (function.__code__.co_filename, function.__qualname__)
        processes = [
            context.Process(
                target=_run_rank, args=(rank, num_processes, folder, target, args), daemon=True
            )
            for rank in range(num_processes)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout_s
        while any(p.is_alive() for p in processes) and time.monotonic() < deadline:
            if any(p.exitcode for p in processes):
                deadline = min(deadline, time.monotonic() + _GRACE_S)
            time.sleep(0.005)
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()

        failures: list[str] = []
        for rank, process in enumerate(processes):
            if process.exitcode != 0:
                report = Path(folder, f"error_{rank}")
                text = report.read_text() if report.exists() else "ended without a traceback"
                failures.append(f"rank {rank}, exit code {process.exitcode}: {text}")
        if failures:
            raise RuntimeError("\n".join(failures))
        return [
            torch.load(Path(folder, f"result_{rank}"), weights_only=True)
            for rank in range(num_processes)
        ]


def _run_rank(
    rank: int, num_processes: int, folder: str, target: tuple[str, str], args: tuple[Any, ...]
) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=Path(folder, "rendezvous").as_uri(),
            rank=rank,
            world_size=num_processes,
        )
        torch.save(_load(*target)(*args), Path(folder, f"result_{rank}"))
        # No rank exits while another rank may still send to it.
        dist.barrier()
    except BaseException:
        Path(folder, f"error_{rank}").write_text(traceback.format_exc())
        sys.exit(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _load(file: str, name: str) -> Callable[..., Any]:
    """The function from its file: test modules have no importable name under importlib mode."""
    spec = importlib.util.spec_from_file_location("dilated_test_worker", file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file, so {name} cannot be run in a process.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, name)
