"""shift_sequence against a shift of the whole sequence, one position at a time, on 1 to 4 ranks."""

from itertools import pairwise
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring import shard_sequence, shift_sequence, unshard_sequence
from dilated_ring.layout import LAYOUTS
from dilated_ring.sharding import shards
from dilated_ring.transport import DistributedTransport

# Lengths and the shifts tried with each: less and more than a shard, and beyond the sequence.
CASES = [(0, [1]), (1, [1, -1, 0]), (3, [1, -1, 2]), (13, [1, -1, 4, -6, 12, -13, 50])]


def _shifted(x, distance, fill, bounds):
    """The definition: y[i] = x[i + distance] within the document of i, along dimension 1."""
    y = torch.full_like(x, fill)
    for a, b in pairwise(bounds):
        for i in range(a, b):
            if a <= i + distance < b:
                y[:, i] = x[:, i + distance]
    return y


def _check_values(group=None):
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        for seq_len, distances in CASES:
            documents = [[0, seq_len], [0, seq_len // 3, seq_len // 3, seq_len - 1, seq_len]]
            for distance in distances:
                for bounds in documents if seq_len else documents[:1]:
                    x = torch.randn(2, seq_len, generator=generator, dtype=torch.float64)
                    g = torch.randn(2, seq_len, generator=generator, dtype=torch.float64)
                    local = shard_sequence(x, layout=layout, group=group).requires_grad_()
                    y = shift_sequence(
                        local,
                        distance,
                        fill=-100,
                        layout=layout,
                        group=group,
                        cu_seqlens=torch.tensor(bounds) if bounds != [0, seq_len] else None,
                        seq_len=None if distance == 1 else seq_len,
                    )
                    where = f"{layout}, {seq_len} positions, shift {distance}, documents {bounds}"
                    expected = _shifted(x, distance, -100, bounds)
                    whole = unshard_sequence(y, layout=layout, group=group)
                    assert torch.equal(whole, expected), where
                    # The gradient is the shift back.
                    y.backward(shard_sequence(g, layout=layout, group=group))
                    expected = shard_sequence(
                        _shifted(g, -distance, 0, bounds), layout=layout, group=group
                    )
                    assert torch.equal(local.grad, expected), where


def _check_dtypes_and_dims():
    for dtype, fill in [(torch.bool, True), (torch.int64, -100), (torch.bfloat16, 0.5)]:
        x = (torch.arange(7) % 2).to(dtype)
        expected = torch.cat([x[2:], torch.full((2,), fill, dtype=dtype)])
        wide = x.expand(3, 2, 7)
        for dim in range(3):
            local = shard_sequence(wide.movedim(-1, dim), dim, layout="zigzag")
            y = shift_sequence(local, 2, fill=fill, dim=dim - 3, layout="zigzag")
            assert y.dtype == dtype
            assert y.is_contiguous()
            whole = unshard_sequence(y, dim, layout="zigzag")
            assert torch.equal(whole, expected.expand(3, 2, 7).movedim(-1, dim))


def _bytes_of_one_shift(layout):
    """What `shift_sequence` sends, without the agreement of the ranks before it."""
    sent = []

    class Counted(DistributedTransport):
        def start(self, *args, **options):
            before = self.sent_bytes
            pending = super().start(*args, **options)
            sent.append(self.sent_bytes - before)
            return pending

    local = shard_sequence(torch.zeros(2, 100_000, dtype=torch.int64), layout=layout)
    with patch.object(shards, "DistributedTransport", Counted):
        shift_sequence(local, 1, fill=-100, layout=layout)
    return sum(sent)


def _all_checks():
    rank, size = dist.get_rank(), dist.get_world_size()
    _check_values()
    _check_dtypes_and_dims()
    halves = [dist.new_group(list(range(first, size, 2))) for first in range(2)]
    _check_values(halves[rank % 2])
    return [_bytes_of_one_shift(layout) for layout in LAYOUTS]


def test_one_process() -> None:
    _check_values()
    _check_dtypes_and_dims()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks(size: int) -> None:
    for rank, (contiguous, zigzag) in enumerate(run_processes(_all_checks, size)):
        # A row is two int64. In zigzag, the front part of a rank begins a border with the rank
        # before it and its back part a border with the rank after it.
        assert contiguous == 16 * (rank > 0)
        assert zigzag == 16 * ((rank > 0) + (rank < size - 1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fill": 0.5}, ValueError, "fill is 0.5 and x_local has dtype torch.int64"),
        ({"fill": 2**70}, ValueError, "fill must be an integer from -9223372036854775808 to"),
        ({"fill": float("nan")}, ValueError, "fill is nan"),
        ({"fill": True}, TypeError, "fill is True and x_local has dtype torch.int64"),
        ({"fill": None}, TypeError, "fill is None"),
        ({"shift": 1.5}, TypeError, "shift is 1.5; it must be an integer"),
        ({"dim": 2}, ValueError, "dim is 2; it must be at most 1"),
        ({"seq_len": 4}, ValueError, "x_local has 3 positions on rank 0"),
        ({"cu_seqlens": [0, 3]}, TypeError, "cu_seqlens is a list"),
        (
            {"cu_seqlens": torch.tensor([0, 4])},
            ValueError,
            "cu_seqlens ends at 4 and the sequence has 3 positions; the last document must end "
            "where the sequence does",
        ),
    ],
)
def test_mistakes_have_a_sentence(options, error, message) -> None:
    given = {"shift": 1, "fill": -100} | options
    with pytest.raises(error, match=message):
        shift_sequence(torch.zeros(2, 3, dtype=torch.int64), **given)


def test_a_fill_outside_of_a_small_dtype() -> None:
    with pytest.raises(ValueError, match="an integer from 0 to 255, or convert x_local first"):
        shift_sequence(torch.zeros(1, 3, dtype=torch.uint8), 1, fill=-100)
