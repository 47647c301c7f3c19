"""The N-process runner itself, and data-parallel training with it."""

import os
import time

import pytest
import torch
import torch.distributed as dist
from dilated_core import MultiheadDilatedAttention
from dilated_core.testing import run_processes
from torch.nn.parallel import DistributedDataParallel


def _sum_of_ranks(offset):
    x = torch.tensor([float(dist.get_rank() + offset)])
    dist.all_reduce(x)
    return {"sum": x, "rank": dist.get_rank(), "threads": torch.get_num_threads()}


def _one_rank_raises():
    if dist.get_rank() == 1:
        raise ArithmeticError("rank one has had enough")
    dist.barrier()


def _one_rank_dies():
    if dist.get_rank() == 0:
        os._exit(3)


def _one_rank_sleeps():
    if dist.get_rank() == 0:
        time.sleep(60)


def _model():
    torch.manual_seed(0)
    lengths, rates = [8, 24], [1, 3]
    return MultiheadDilatedAttention(
        16, 4, segment_lengths=lengths, dilation_rates=rates, dtype=torch.float64
    )


def _batch():
    return torch.randn(4, 24, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _data_parallel_gradients():
    model = DistributedDataParallel(_model())
    share = _batch().chunk(dist.get_world_size())[dist.get_rank()]
    model(share, share, share, is_causal=True).square().mean().backward()
    return {name: p.grad for name, p in model.module.named_parameters()}


def test_results_come_back_by_rank():
    results = run_processes(_sum_of_ranks, 3, 10)
    assert [r["rank"] for r in results] == [0, 1, 2]
    assert all(r["sum"].item() == 33 and r["threads"] == 1 for r in results)


def test_an_error_shows_with_its_rank():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1, exit code 1: .*rank one has had enough"):
        run_processes(_one_rank_raises, 2)


def test_a_dead_process_shows():
    with pytest.raises(RuntimeError, match="rank 0, exit code 3: ended without a traceback"):
        run_processes(_one_rank_dies, 2)


def test_time_runs_out():
    with pytest.raises(RuntimeError, match="rank 0, exit code -15"):
        run_processes(_one_rank_sleeps, 2, timeout_s=2)


def test_data_parallel_gradients_are_those_of_one_process():
    model, x = _model(), _batch()
    model(x, x, x, is_causal=True).square().mean().backward()
    for gradients in run_processes(_data_parallel_gradients, 2):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12)
