"""What `topk_hook` puts into the gradients: the mean of what the ranks chose, without losses."""

import math

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing.processes import run_processes
from dilated_ring import TopKCompression, topk_hook
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Products(nn.Module):
    """Its gradient is the input: one factor per parameter, `None` for parameters left unused."""

    def __init__(self, shapes, dtype=torch.float32):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)

    def forward(self, factors):
        pairs = zip(self.weights, factors, strict=True)
        return sum((w * x).sum() for w, x in pairs if x is not None)


SHAPES = [(40,), (5, 7), (1,), (0,), (3, 4, 5), (90,)]


def _factors(shapes, rank, step, dtype=torch.float32):
    # With this seed, no two 16-bit elements compete as equals for the last place.
    generator = torch.Generator().manual_seed(100 * rank + step + 10)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _wrap(model, **options):
    keys = ("ratio", "max_tensors", "error_feedback")
    compression = {key: options.pop(key) for key in keys if key in options}
    ddp = DistributedDataParallel(model, **options)
    state = TopKCompression(ddp, **compression)
    ddp.register_comm_hook(state, topk_hook)
    return ddp, state


def _gradients(ddp, factors):
    ddp.zero_grad()
    ddp(factors).backward()
    return [p.grad.clone() for p in ddp.parameters()]


def _own_errors(state):
    return state.state_dict()[f"rank_{dist.get_rank()}"]


def _expected(all_factors, errors, ratio):
    """The definition, with sorting: the mean of the largest elements, and the new errors."""
    means = []
    for i, shape in enumerate(SHAPES):
        total = torch.zeros(shape, dtype=torch.float64).reshape(-1)
        for rank, factors in enumerate(all_factors):
            corrected = errors[rank][i] + factors[i].double().reshape(-1)
            count = min(corrected.numel(), max(1, round(ratio * corrected.numel())))
            chosen = sorted(range(corrected.numel()), key=lambda j: -abs(corrected[j].item()))
            errors[rank][i] = corrected.clone()
            for j in chosen[:count]:
                sent = corrected[j].to(factors[i].dtype).double()
                total[j] += sent
                errors[rank][i][j] -= sent
        means.append((total / len(all_factors)).reshape(shape))
    return means


def _plain_and_full():
    rank, equal = dist.get_rank(), []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        plain = DistributedDataParallel(Products(SHAPES, dtype))
        full, state = _wrap(Products(SHAPES, dtype), ratio=1.0)
        for step in range(3):
            factors = _factors(SHAPES, rank, step, dtype)
            expected = _gradients(plain, factors)
            equal += [
                torch.equal(a, b) for a, b in zip(_gradients(full, factors), expected, strict=True)
            ]
        equal.append(state.sent_bytes == state.all_reduce_bytes > 0)
    return all(equal)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ratio_one_gives_the_bits_of_plain_training(ranks: int) -> None:
    assert run_processes(_plain_and_full, ranks) == [True] * ranks


def _four_steps(dtype, options):
    ddp, state = _wrap(Products(SHAPES, dtype), ratio=0.1, **options)
    rank = dist.get_rank()
    steps = [_gradients(ddp, _factors(SHAPES, rank, step, dtype)) for step in range(4)]
    return steps, list(_own_errors(state).values())


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"bucket_cap_mb": 0.0003}),  # after the first step, several buckets
        (torch.bfloat16, {"gradient_as_bucket_view": True}),
        (torch.float16, {"static_graph": True, "max_tensors": 2}),
        (torch.float64, {}),
    ],
)
def test_the_mean_of_the_largest_elements_arrives(dtype: torch.dtype, options: dict) -> None:
    ranks = 3 if dtype == torch.float32 else 2
    results = run_processes(_four_steps, ranks, dtype, options)
    zeros = [torch.zeros(math.prod(shape), dtype=torch.float64) for shape in SHAPES]
    errors = [list(zeros) for _ in range(ranks)]
    tolerance = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-6}.get(dtype, 1e-14)
    for step in range(4):
        means = _expected([_factors(SHAPES, r, step, dtype) for r in range(ranks)], errors, 0.1)
        for i, mean in enumerate(means):
            got = [steps[step][i] for steps, _ in results]
            assert got[0].dtype == dtype
            assert all(torch.equal(got[0], other) for other in got)
            torch.testing.assert_close(got[0].double(), mean, rtol=tolerance, atol=tolerance)
    for rank, (_, kept) in enumerate(results):
        for error, expected in zip(kept, errors[rank], strict=True):
            assert error.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(error.double().reshape(-1), expected, rtol=0, atol=1e-5)


def _unused_parameters():
    rank, shapes = dist.get_rank(), [(50,), (50,), (50,)]
    ddp, state = _wrap(Products(shapes), ratio=0.1, find_unused_parameters=True)
    arrived, given = torch.zeros(3, 50), torch.zeros(3, 50)
    for step in range(6):
        factors = _factors(shapes, rank, step)
        if step in (2, 3):
            factors[0] = None  # on no rank
        if step == 4 and rank == 1:
            factors[1] = None  # on one rank
        ddp.zero_grad(set_to_none=True)
        ddp(factors).backward()
        for i, p in enumerate(ddp.parameters()):
            arrived[i] += 0 if p.grad is None else p.grad
            given[i] += 0 if factors[i] is None else factors[i]
    return arrived, given, torch.stack(list(_own_errors(state).values()))


def test_nothing_is_lost_where_parameters_are_unused() -> None:
    results = run_processes(_unused_parameters, 2)
    arrived = results[0][0] * 2
    given, kept = (sum(result[i] for result in results) for i in (1, 2))
    torch.testing.assert_close(arrived + kept, given, rtol=0, atol=1e-5)


def _not_finite():
    ddp, state = _wrap(Products([(100,), (100,)]), ratio=0.03)
    rank, shapes = dist.get_rank(), [(100,), (100,)]
    _gradients(ddp, _factors(shapes, rank, 0))
    before = _own_errors(state)
    few = _factors(shapes, rank, 1)
    if rank == 1:
        few[0][[3, 70]] = torch.tensor([math.nan, math.inf])
    few = _gradients(ddp, few)
    after = _own_errors(state)
    kept = [torch.equal(before[key], after[key]) for key in before]
    many = _factors(shapes, rank, 2)
    if rank == 0:
        many[1][:50] = math.nan
    return few, kept, _gradients(ddp, many), _gradients(ddp, _factors(shapes, rank, 3))


def test_values_that_are_not_finite_arrive_and_do_not_stay() -> None:
    first, second = run_processes(_not_finite, 2)
    for few, _, many, later in (first, second):
        assert few[0].isnan().nonzero().flatten().tolist() == [3]
        assert few[0].isinf().nonzero().flatten().tolist() == [70]
        assert few[1].isfinite().all()
        assert many[0].isfinite().all()
        assert many[1].isnan().all()
        assert all(gradient.isfinite().all() for gradient in later)
    assert first[1] == [False, False]
    assert second[1] == [True, False]


def _counted_messages():
    lengths, at_return, all_gather = [], [], dist.all_gather_into_tensor

    def counted(output, payload, **options):
        lengths.append(payload.nbytes)
        return all_gather(output, payload, **options)

    def hook(state, bucket):
        future = topk_hook(state, bucket)
        at_return.append(len(lengths))
        return future

    dist.all_gather_into_tensor = counted
    shapes = [(1000,)] * 70
    ddp = DistributedDataParallel(Products(shapes, torch.bfloat16))
    state = TopKCompression(ddp)
    ddp.register_comm_hook(state, hook)
    _gradients(ddp, _factors(shapes, dist.get_rank(), 0, torch.bfloat16))
    return lengths, at_return, state.sent_bytes, state.all_reduce_bytes


def test_messages_of_at_most_32_tensors_start_in_the_hook_and_are_counted() -> None:
    for lengths, at_return, sent, plain in run_processes(_counted_messages, 3):
        # 10 elements of each parameter, 4 bytes for the index and 2 for the value.
        assert lengths == [32 * 60, 32 * 60, 6 * 60]
        assert at_return == [3]
        assert sent == 2 * sum(lengths)
        assert plain == 2 * 2 * 70_000 * 2 // 3


def _other_arguments_after_a_resumption():
    rank, result = dist.get_rank(), []
    for options in ({"ratio": 1.0}, {"ratio": 0.9999, "error_feedback": False}):
        ddp, state = _wrap(Products(SHAPES), ratio=0.1)
        first = _gradients(ddp, _factors(SHAPES, rank, 0))
        ddp, resumed = _wrap(Products(SHAPES), **options)
        resumed.load_state_dict(state.state_dict())
        second = _gradients(ddp, _factors(SHAPES, rank, 1))
        third = _gradients(ddp, _factors(SHAPES, rank, 2))
        result.append((first, second, third))
    return result


def test_loaded_errors_are_sent_once_where_no_new_ones_are_kept() -> None:
    factors = [[_factors(SHAPES, rank, step) for rank in range(2)] for step in range(3)]
    means = [[(a + b) / 2 for a, b in zip(*ranks, strict=True)] for ranks in factors]
    for first, second, third in run_processes(_other_arguments_after_a_resumption, 2)[0]:
        for i in range(len(SHAPES)):
            torch.testing.assert_close(first[i] + second[i], means[0][i] + means[1][i])
            torch.testing.assert_close(third[i], means[2][i])


def _group_of_two():
    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    ddp, state = _wrap(Products(SHAPES), ratio=0.999, process_group=group)
    return _gradients(ddp, _factors(SHAPES, dist.get_rank(), 0)), list(state.state_dict())


def test_a_group_may_be_any_ranks() -> None:
    _, *results = run_processes(_group_of_two, 3)
    factors = [_factors(SHAPES, rank, 0) for rank in (1, 2)]
    for rank, (gradients, keys) in enumerate(results):
        assert keys == ["world_size", f"rank_{rank}"]
        for got, a, b in zip(gradients, *factors, strict=True):
            torch.testing.assert_close(got, (a + b) / 2)


def _uses_of_ddp():
    torch.manual_seed(0)
    rank = dist.get_rank()
    images = torch.randn(4, 2, 6, 6).to(memory_format=torch.channels_last)
    result = {}
    for name in ("plain", "hook"):
        torch.manual_seed(1)
        model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        ddp = DistributedDataParallel(model)
        if name == "hook":
            ddp.register_comm_hook(TopKCompression(ddp, ratio=0.9999), topk_hook)
        with ddp.no_sync():
            ddp(images * rank).square().sum().backward()
        with ddp.join():
            for _ in range(2 + rank):  # rank 0 stops one step before rank 1
                ddp(images).square().sum().backward()
        result[name] = [p.grad.clone() for p in ddp.parameters()]
    return result


def test_accumulation_uneven_inputs_and_channels_last_work_as_without_the_hook() -> None:
    for result in run_processes(_uses_of_ddp, 2):
        for plain, hook in zip(result["plain"], result["hook"], strict=True):
            torch.testing.assert_close(hook, plain)


def _train(seed):
    """Both ranks learn from a teacher, whose answers they see with opposite disturbances.

    The disturbances cancel in the mean alone: gradients of one rank never vanish.
    """
    losses = {}
    for mode in ("plain", "feedback", "none"):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 2))
        teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
        x = torch.randn(128, 8)
        y = teacher(x).detach()
        seen = y + torch.randn(128, 2) * (1 if dist.get_rank() == 0 else -1)
        ddp = DistributedDataParallel(model)
        if mode != "plain":
            state = TopKCompression(ddp, ratio=0.01, error_feedback=mode == "feedback")
            ddp.register_comm_hook(state, topk_hook)
        optimizer = torch.optim.SGD(ddp.parameters())
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / STEPS)
            optimizer.zero_grad()
            (ddp(x) - seen).square().mean().backward()
            optimizer.step()
        with torch.no_grad():
            losses[mode] = (model(x) - y).square().mean().item()
    return losses


STEPS = 400


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2))]
)
def test_one_percent_converges_because_of_the_errors(seed: int) -> None:
    losses = run_processes(_train, 2, seed)[0]
    assert losses["feedback"] < 1.25 * losses["plain"], losses
    assert losses["none"] > 3 * losses["plain"], losses
