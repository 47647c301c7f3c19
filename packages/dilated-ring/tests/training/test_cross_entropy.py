"""chunked_cross_entropy against PyTorch's cross-entropy of whole logits, on 1 to 3 ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring import chunked_cross_entropy, shard_sequence
from torch.nn.functional import cross_entropy, linear
from torch.nn.parallel import DistributedDataParallel

D, V = 6, 11
# Positions without a label. Rank 0 of two and of three has none in the contiguous layout.
IGNORED = {"none": (), "rank 0": (0, 1, 2, 3), "all": range(7)}


def _problem(tokens=(2, 7), *, dtype=torch.float64, ignored=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in [(*tokens, D), (V, D), (V,)]
    )
    labels = torch.randint(V, tokens, generator=generator)
    labels[:, list(ignored)] = -100
    return hidden, weight, bias, labels


def _whole(hidden, weight, bias, labels):
    """The mean loss and its gradients from whole logits."""
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    logits = linear(*leaves).flatten(0, -2)
    if logits.dtype.itemsize == 2:
        logits = logits.float()
    loss = cross_entropy(logits, labels.flatten())
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _chunked(hidden, weight, bias, labels, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    loss = chunked_cross_entropy(*leaves[:2], labels, bias=leaves[2], **options)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def _assert_close(actual, exact):
    torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-14)


def test_the_mean_of_one_process() -> None:
    problem = _problem(ignored=(0, 4))
    _assert_close(_chunked(*problem), _whole(*problem))


def test_tokens_without_a_label_are_skipped_whatever_they_hold() -> None:
    hidden, weight, bias, labels = _problem(ignored=(1, 2))
    expected = _chunked(hidden, weight, bias, labels)
    hidden[:, 1:3] = math.nan
    for actual, exact in zip(_chunked(hidden, weight, bias, labels), expected, strict=True):
        assert torch.equal(actual, exact)
    labels[:] = 7
    nothing = _chunked(hidden, weight, bias, labels, ignore_index=7)
    nothing += _chunked(hidden[:, :0], weight, bias, labels[:, :0])
    assert not any(result.any() for result in nothing)


def _model():
    model = torch.nn.Linear(D, D, dtype=torch.float64)
    torch.nn.init.eye_(model.weight)
    torch.nn.init.zeros_(model.bias)
    return model


def _all_checks():
    rank, size = dist.get_rank(), dist.get_world_size()
    results = {}
    for name, ignored in IGNORED.items():
        hidden, weight, bias, labels = _problem(ignored=ignored)
        hidden, labels = shard_sequence(hidden), shard_sequence(labels)
        results[name] = _chunked(hidden, weight, bias, labels)
    # Groups at the same time: each rank alone.
    alone = [dist.new_group([r]) for r in range(size)][rank]
    results["alone"] = _chunked(*_problem(seed=rank), group=alone)
    # DistributedDataParallel averages, so the loss is multiplied by the number of ranks.
    model = DistributedDataParallel(_model())
    hidden, weight, _, labels = _problem(ignored=IGNORED["rank 0"])
    hidden, labels = shard_sequence(hidden), shard_sequence(labels)
    (chunked_cross_entropy(model(hidden), weight, labels) * size).backward()
    results["wrapped"] = [p.grad for p in model.parameters()]
    return results


@pytest.mark.parametrize("size", [2, 3])
def test_shares_of_ranks_add_up_to_one_process(size) -> None:
    results = run_processes(_all_checks, size)
    for name, ignored in IGNORED.items():
        problem = _problem(ignored=ignored)
        exact = _whole(*problem)
        if name == "all":
            exact = [torch.zeros_like(x) for x in exact]
        loss, d_hidden, d_weight, d_bias = zip(*(r[name] for r in results), strict=True)
        actual = [sum(loss), torch.cat(d_hidden, 1), sum(d_weight), sum(d_bias)]
        _assert_close(actual, exact)
        assert (loss[0] == 0) == (name != "none")
    model = _model()
    hidden, weight, _, labels = _problem(ignored=IGNORED["rank 0"])
    cross_entropy(linear(model(hidden), weight).flatten(0, 1), labels.flatten()).backward()
    for rank, result in enumerate(results):
        _assert_close(result["alone"], _whole(*_problem(seed=rank)))
        _assert_close(result["wrapped"], [p.grad for p in model.parameters()])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        # Core's checks, of which its own tests have all.
        ({"labels": torch.full((2, 7), V)}, ValueError, "labels holds 11 and weight has 11 rows"),
        ({"group": "cp"}, TypeError, "group is a str"),
    ],
)
def test_mistakes_have_a_sentence(change, error, message) -> None:
    names = ("hidden", "weight", "bias", "labels")
    with pytest.raises(error, match=message):
        chunked_cross_entropy(**(dict(zip(names, _problem(), strict=True)) | change))


def test_a_dtensor_is_refused() -> None:
    hidden, weight, _, labels = _problem()
    weight.placements = ()  # what tells a DTensor, whose import takes seconds
    with pytest.raises(TypeError, match=r"weight is a DTensor; it must be a plain tensor, so call"):
        chunked_cross_entropy(hidden, weight, labels)
