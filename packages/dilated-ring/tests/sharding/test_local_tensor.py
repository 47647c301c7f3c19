"""unshard_sequence on gloo ranks against PyTorch's own collectives, simulated in one process.

PyTorch's simulation has collectives of equal sizes, so shards are even here; its module is private.
"""

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring import local_positions, unshard_sequence
from dilated_ring.layout import LAYOUTS

SIZE, SEQ_LEN = 3, 12


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = x.new_empty(SEQ_LEN)
        dist.all_gather_into_tensor(out, x)
        return out

    @staticmethod
    def backward(ctx, grad):
        out = grad.new_empty(SEQ_LEN // SIZE)
        dist.reduce_scatter_tensor(out, grad.contiguous())
        return out


def _part(rank):
    return torch.arange(4.0) + 10 * rank


def _weights(rank):
    return torch.arange(12.0).roll(rank)


def _ours():
    rank = dist.get_rank()
    results = []
    for layout in LAYOUTS:
        part = _part(rank).requires_grad_()
        whole = unshard_sequence(part, 0, layout=layout)
        (whole.square() * _weights(rank)).sum().backward()
        results.append((whole.detach(), part.grad))
    return results


def test_values_and_gradients_are_those_of_simulated_collectives() -> None:
    # Not at the top: the ranks load this file, and the import takes seconds.
    fakes = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    local_tensor = pytest.importorskip("torch.distributed._local_tensor")
    dist.init_process_group("fake", rank=0, world_size=SIZE, store=fakes.FakeStore())
    try:
        simulated = []
        for layout in LAYOUTS:
            order = torch.cat([local_positions(layout, SEQ_LEN, (r, SIZE)) for r in range(SIZE)])
            with local_tensor.LocalTensorMode(SIZE) as mode:
                part = mode.rank_map(_part).requires_grad_()
                whole = _Gather.apply(part)[order.argsort()]
                (whole.square() * mode.rank_map(_weights)).sum().backward()
            simulated.append((whole.detach(), part.grad))
    finally:
        dist.destroy_process_group()
    for rank, ours in enumerate(run_processes(_ours, SIZE)):
        for (whole, grad), (simulated_whole, simulated_grad) in zip(ours, simulated, strict=True):
            assert torch.equal(whole, simulated_whole._local_tensors[rank])
            assert torch.equal(grad, simulated_grad._local_tensors[rank])
