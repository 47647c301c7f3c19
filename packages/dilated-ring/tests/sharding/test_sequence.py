"""shard_sequence and unshard_sequence: values, gradients, dtypes and refusals on 1 to 4 ranks."""

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring import local_positions, shard_sequence, unshard_sequence
from dilated_ring.layout import LAYOUTS
from dilated_ring.transport import RankFailure

LENGTHS = [0, 1, 2, 3, 5, 8, 13, 24]


def _indices(shape, dim):
    """A tensor of global indices along `dim`, other entries told apart by multiples of 100."""
    x = torch.arange(shape[dim]).view(
        [-1 if i == dim % len(shape) else 1 for i in range(len(shape))]
    )
    others = list(shape)
    others[dim] = 1
    return x + 100 * torch.arange(torch.Size(others).numel()).view(others)


def _check_round_trip(group=None):
    for layout in LAYOUTS:
        for seq_len in LENGTHS:
            for shape, dim in [((2, seq_len, 3), 1), ((seq_len,), 0), ((2, 3, seq_len), -1)]:
                x = _indices(shape, dim)
                local = shard_sequence(x, dim, group=group, layout=layout)
                positions = local_positions(layout, seq_len, group)
                assert torch.equal(local, x.index_select(dim, positions))
                assert local.is_contiguous()
                for given in (None, seq_len):
                    whole = unshard_sequence(local, dim, group=group, layout=layout, seq_len=given)
                    assert torch.equal(whole, x)
                    assert whole.is_contiguous()


def _check_dtypes():
    dtypes = [torch.bool, torch.uint8, torch.int16, torch.int64, torch.bfloat16, torch.float16]
    for dtype in [*dtypes, torch.float64, torch.complex64, torch.float8_e4m3fn]:
        x = (torch.arange(14).view(2, 7) % 3).to(dtype)
        whole = unshard_sequence(shard_sequence(x))
        assert whole.dtype == dtype
        assert torch.equal(whole.view(torch.uint8), x.view(torch.uint8))
    # Neither side of a transposed tensor is contiguous.
    x = torch.randn(7, 2).t()
    assert torch.equal(unshard_sequence(shard_sequence(x)), x)


def _close(a, b):
    # torch.testing.assert_close imports sympy, which takes seconds in each process.
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-12, atol=1e-12)


def _check_gradients(rank, size):
    """Against one process, whose loss is the sum of the losses of all ranks."""
    generator = torch.Generator().manual_seed(0)
    for layout in LAYOUTS:
        for seq_len in LENGTHS:
            full = torch.randn(2, seq_len, 3, generator=generator, dtype=torch.float64)
            weights = torch.randn(size, 2, seq_len, 3, generator=generator, dtype=torch.float64)
            positions = local_positions(layout, seq_len)

            # Each rank's loss of its own part.
            x = full.clone().requires_grad_()
            local = shard_sequence(x, layout=layout)
            (local.square() * weights[0][:, positions]).sum().backward()
            assert _close(x.grad, 2 * full * weights[0])

            # Each rank's own loss of the whole.
            part = full[:, positions].clone().requires_grad_()
            whole = unshard_sequence(part, layout=layout)
            (whole.square() * weights[rank]).sum().backward()
            expected = 2 * full * weights.sum(0)
            assert _close(part.grad, expected[:, positions])

    # The same bits twice, half precision added wide, and second derivatives.
    x = torch.randn(3, 7, generator=generator).bfloat16()
    ones = torch.stack([torch.randn(3, 7, generator=generator).bfloat16() for _ in range(size)])
    part = shard_sequence(x).requires_grad_()
    grads = [
        torch.autograd.grad((unshard_sequence(part) * ones[rank]).sum(), part)[0] for _ in range(2)
    ]
    assert torch.equal(*grads)
    assert torch.equal(grads[0], shard_sequence(ones.float().sum(0).bfloat16()))
    part = torch.full((1, 2), 3.0, requires_grad=True)
    (first,) = torch.autograd.grad(unshard_sequence(part).pow(3).sum(), part, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), part)
    assert torch.equal(first, torch.full((1, 2), size * 27.0))
    assert torch.equal(second, torch.full((1, 2), size * 18.0))


def _error(function, *args, **options):
    try:
        function(*args, **options)
    except (ValueError, TypeError, RankFailure) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _all_checks():
    rank, size = dist.get_rank(), dist.get_world_size()
    _check_round_trip()
    _check_dtypes()
    _check_gradients(rank, size)
    # Groups of every second rank: 0 2, and 1 3, at the same time.
    halves = [dist.new_group(list(range(first, size, 2))) for first in range(2)]
    _check_round_trip(halves[rank % 2])
    odd = rank == 1
    errors = [
        _error(unshard_sequence, torch.zeros(1, 3 if odd else 2)),
        _error(unshard_sequence, torch.zeros(1 + odd, 2)),
        _error(unshard_sequence, torch.zeros(1, 2, dtype=torch.int32 if odd else torch.int64)),
        _error(unshard_sequence, torch.zeros(1, 2), layout="zigzag" if odd else "contiguous"),
        _error(unshard_sequence, torch.zeros(2, 2), int(odd)),
    ]
    # The group works on after such errors. One that only one rank can see closes its group.
    _check_dtypes()
    group = dist.new_group()
    alone = _error(unshard_sequence, torch.zeros(1, 2 + odd), seq_len=2 * size, group=group)
    return errors, alone


def test_one_process() -> None:
    _check_round_trip()
    _check_dtypes()
    _check_gradients(0, 1)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks(size: int) -> None:
    results = run_processes(_all_checks, size)
    others = "rank 0" if size == 2 else "ranks 0, " + ", ".join(map(str, range(2, size)))
    for rank, (errors, alone) in enumerate(results):
        # The lengths are 2, 3, 2, …, and the longer parts come first.
        assert errors[0] == (
            f"DisagreementError: x_local has 2 positions on rank 0 of the group; in the contiguous "
            f"layout of {2 * size + 1} positions over {size} ranks, rank 0 holds 3, so cut the "
            f"sequence with shard_sequence."
        )
        differ = "DisagreementError: The ranks of the group differ:"
        assert errors[1] == (
            f"{differ} shape is (1, any) on {others}; (2, any) on rank 1. Pass the same on all "
            f"ranks."
        )
        assert f"{differ} dtype is torch.int64 on {others}; torch.int32 on rank 1." in errors[2]
        assert f"{differ} layout is contiguous on {others}; zigzag on rank 1." in errors[3]
        assert f". dim is 0 on {others}; 1 on rank 1." in errors[4]
        if rank == 1:
            assert alone.startswith("ValueError: x_local has 3 positions on rank 1 of the group;")
        else:
            assert alone.startswith("RankFailure: rank 1 failed: ValueError: x_local has 3")


def test_shards_own_their_memory() -> None:
    x = torch.zeros(1, 4)
    shard_sequence(x).fill_(1)
    unshard_sequence(x).fill_(1)
    assert not x.any()


def test_positions_without_processes() -> None:
    assert local_positions("zigzag", 8, (1, 2)).tolist() == [2, 3, 4, 5]
    assert local_positions("contiguous", 2, (3, 4)).dtype == torch.int64
    assert local_positions("contiguous", 3).device == torch.device("cpu")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: shard_sequence(x, 2), ValueError, "dim is 2; it must be at most 1"),
        (lambda x: shard_sequence(x, -3), ValueError, "dim is -3; it must be at least -2"),
        (lambda x: shard_sequence(x, 1.0), TypeError, "dim is 1.0; it must be an integer"),
        (lambda x: shard_sequence([1]), TypeError, "x is a list; it must be a tensor"),
        (lambda x: shard_sequence(x[0, 0], 0), ValueError, "x has no dimension"),
        (
            lambda x: shard_sequence(x, layout="ring"),
            ValueError,
            "layout is 'ring'; it must be one",
        ),
        (lambda x: unshard_sequence(x, seq_len=5), ValueError, "x_local has 3 positions on rank 0"),
        (lambda x: unshard_sequence(x, seq_len=-1), ValueError, "seq_len is -1"),
        (
            lambda x: unshard_sequence(x, timeout_s=0),
            ValueError,
            "timeout_s is 0; it must be above",
        ),
        (lambda x: local_positions("zigzag", 2, (2, 2)), ValueError, "the rank in group is 2"),
        (
            lambda x: local_positions("zigzag", 2, (2,)),
            ValueError,
            r"a tuple must be \(rank, size\)",
        ),
        (lambda x: local_positions("zigzag", 2.5), TypeError, "seq_len is 2.5"),
    ],
)
def test_mistakes_have_a_sentence(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3))
