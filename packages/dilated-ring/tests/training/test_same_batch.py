"""check_same_batch: equal batches pass, and each kind of difference names the ranks."""

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring import check_same_batch


def _error(batch, group=None):
    try:
        check_same_batch(batch, group)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _all_checks():
    rank = dist.get_rank()
    tokens = torch.arange(12).view(3, 4)
    changed = tokens.clone()
    changed[2, 3] += rank == 1
    half = torch.arange(6, dtype=torch.bfloat16)[::2]
    same = {"tokens": tokens, "names": ["a", None, 1.5, True], "half": (half, half.t())}
    pairs = [dist.new_group([0, 2]), dist.new_group([1])]
    return {
        "same": _error(same),
        "other order of names": _error(dict(sorted(same.items(), reverse=bool(rank)))),
        "one value": _error({"tokens": changed}),
        "all": _error(tokens + rank),
        "shape": _error(tokens.view(3, 4) if rank else tokens.view(4, 3)),
        "dtype": _error(torch.zeros(2, dtype=torch.float32 if rank else torch.int32)),
        "empty": _error(torch.zeros(0, rank)),
        "name": _error({"ab"[rank % 2]: tokens}),
        "number": _error([tokens, rank]),
        "group": _error(changed, pairs[rank % 2]),
    }


def test_three_ranks() -> None:
    results = run_processes(_all_checks, 3)
    assert all(result == results[0] for result in results)
    found = results[0]
    passed = [name for name, error in found.items() if error == "no error"]
    assert passed == ["same", "other order of names", "group"]
    assert all(
        error.startswith("DisagreementError: The ranks")
        for error in found.values()
        if error != "no error"
    )
    before, after = found["one value"].split(" with hash ", 1)
    assert before.endswith("The ranks of the group differ: batch['tokens'] is torch.int64 (3, 4)")
    assert " on ranks 0, 2; torch.int64 (3, 4) with hash " in after
    assert after.endswith(
        " on rank 1. Pass the same on all ranks. Ranks that share a sequence must read the same "
        "batch, so give the sampler the number of data-parallel ranks, not of all ranks."
    )
    assert "batch is torch.int64 (4, 3) with hash" in found["shape"]
    assert "batch[1] is 0 on rank 0; 1 on rank 1; 2 on rank 2." in found["number"]
    assert "batch['b'] is nothing on ranks 0, 2; torch.int64" in found["name"]


def test_other_values_are_refused_on_one_process_too() -> None:
    check_same_batch({"tokens": torch.zeros(2)})
    with pytest.raises(TypeError, match=r"batch\['x'\]\[1\] is a set; a batch must hold tensors"):
        check_same_batch({"x": [1, {2}]})
