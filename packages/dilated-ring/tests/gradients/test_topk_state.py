"""`TopKCompression` refuses wrong arguments and wrong states, and resumes with the same bits."""

import io

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from dilated_core.testing.processes import run_processes
from dilated_ring import TopKCompression, topk_hook
from dilated_ring.gradients import topk
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def _run(last_step, saved=None):
    """Train to `last_step`, from the start or from what an interrupted run saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 30), nn.Linear(30, 3))
    # Small buckets: after the first step of a process, the parameters are in other buckets.
    ddp = DistributedDataParallel(model, bucket_cap_mb=0.002)
    compression = TopKCompression(ddp, ratio=0.05)
    ddp.register_comm_hook(compression, topk_hook)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=0.01)
    first_step = 0
    if saved is not None:
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        compression.load_state_dict(state["compression"])
        first_step = state["step"]
    for step in range(first_step, last_step):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        optimizer.zero_grad()
        ddp(x).square().mean().backward()
        optimizer.step()
    file = io.BytesIO()
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "compression": compression.state_dict(),
            "step": last_step,
        },
        file,
    )
    file.seek(0)
    return file, [p.detach() for p in model.parameters()], compression


def _interrupted_and_not():
    result = [_run(9)[1]]
    for interruption in (1, 4):
        saved = _run(interruption)[0]
        result.append(_run(9, saved)[1])
    return result


def test_a_resumed_run_has_the_bits_of_an_undisturbed_one() -> None:
    for undisturbed, *resumed in run_processes(_interrupted_and_not, 2):
        for weights in resumed:
            assert all(torch.equal(a, b) for a, b in zip(weights, undisturbed, strict=True))


def _through_distributed_checkpoint(folder):
    _, _, compression = _run(3)
    rank = dist.get_rank()
    dcp.save({"compression": compression}, checkpoint_id=folder)
    _, _, fresh = _run(0)
    dcp.load({"compression": fresh}, checkpoint_id=folder)
    return [s.state_dict()[f"rank_{rank}"] for s in (compression, fresh)]


def test_distributed_checkpoint_keeps_the_errors_of_ranks_apart(tmp_path) -> None:
    (saved, loaded), (other, _) = run_processes(_through_distributed_checkpoint, 2, str(tmp_path))
    assert any(error.any() for error in saved.values())
    for name, error in saved.items():
        assert torch.equal(loaded[name], error)
        assert not torch.equal(other[name], error)


def _message(function, *args, **options):
    try:
        function(*args, **options)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _wrong_arguments():
    ddp = DistributedDataParallel(nn.Linear(2, 3))
    result = {
        repr(options): _message(TopKCompression, ddp, **options)
        for options in (
            *({"ratio": r} for r in (0, -0.1, 1.01, float("nan"), "0.1", True, None)),
            *({"max_tensors": m} for m in (0, 2.0)),
            {"error_feedback": 1},
        )
    }
    result["module"] = _message(TopKCompression, ddp.module)
    topk._MAX_ELEMENTS = 5
    result["large"] = _message(TopKCompression, ddp)
    return result


def test_wrong_arguments_are_refused() -> None:
    (messages,) = run_processes(_wrong_arguments, 1)
    starts = {
        "{'ratio': 0}": "ValueError: ratio is the part of the gradients that is sent, above 0",
        "{'ratio': -0.1}": "ValueError: ratio",
        "{'ratio': 1.01}": "ValueError: ratio",
        "{'ratio': nan}": "ValueError: ratio",
        "{'ratio': '0.1'}": "TypeError: ratio must be a number, not str",
        "{'ratio': True}": "TypeError: ratio",
        "{'ratio': None}": "TypeError: ratio",
        "{'max_tensors': 0}": "ValueError: max_tensors must be at least 1, not 0",
        "{'max_tensors': 2.0}": "TypeError: max_tensors must be an int, not float",
        "{'error_feedback': 1}": "TypeError: error_feedback must be a bool, not int",
        "module": "TypeError: ddp must be a DistributedDataParallel, not Linear",
        "large": "ValueError: Parameter weight has 6 elements",
    }
    assert messages.keys() == starts.keys()
    for key, start in starts.items():
        assert messages[key].startswith(start), messages[key]


def _wrong_states():
    ddp = DistributedDataParallel(nn.Linear(2, 3))
    state = TopKCompression(ddp)
    ddp.register_comm_hook(state, topk_hook)
    ddp(torch.ones(1, 2) + dist.get_rank()).sum().backward()
    good = state.state_dict()
    key = f"rank_{dist.get_rank()}"
    errors = good[key]
    wrong = {
        "no dict": 3,
        "other rank": {"world_size": 2, "rank_7": errors},
        "more ranks": {**good, "world_size": 4},
        "no world size": {key: errors},
        "extra": {**good, "ratio": 1},
        "no errors": {**good, key: None},
        "missing": {**good, key: {"weight": errors["weight"]}},
        "unexpected": {**good, key: {**errors, "gain": errors["bias"]}},
        "no tensor": {**good, key: {**errors, "bias": 1.0}},
        "shape": {**good, key: {**errors, "bias": errors["bias"][:2]}},
        "dtype": {**good, key: {**errors, "bias": errors["bias"].double()}},
    }
    messages = {case: _message(state.load_state_dict, bad) for case, bad in wrong.items()}
    unchanged = all(torch.equal(a, errors[n]) for n, a in state.state_dict()[key].items())
    scale = [_message(state.scale_errors, f) for f in (0, float("inf"), 4)]
    scaled = all(torch.equal(a, 4 * errors[n]) for n, a in state.state_dict()[key].items())
    return messages, unchanged, scale, scaled, any(e.any() for e in errors.values())


def test_wrong_states_are_refused_and_change_nothing() -> None:
    results = run_processes(_wrong_states, 2)
    starts = {
        "no dict": "TypeError: state_dict must be a dict, not int",
        "other rank": "ValueError: This state has the keys ['rank_7', 'world_size']",
        "more ranks": "ValueError: This state was saved on 4 ranks and cannot be loaded on 2",
        "no world size": "ValueError: This state was saved on None ranks",
        "extra": "ValueError: This state has the keys",
        "no errors": "TypeError: rank_0 must be a dict of errors, not NoneType",
        "missing": "ValueError: This state belongs to another model: it lacks the parameters "
        "['bias']",
        "unexpected": "ValueError: This state belongs to another model: it lacks the parameters "
        "[], and has ['gain']",
        "no tensor": "TypeError: The error of bias must be a tensor, not float",
        "shape": "ValueError: The error of bias is torch.float32 of shape [2]",
        "dtype": "ValueError: The error of bias is torch.float64 of shape [3]",
    }
    messages, *_ = results[0]
    assert messages.keys() == starts.keys()
    for case, start in starts.items():
        assert messages[case].startswith(start), messages[case]
    for _, unchanged, scale, scaled, any_error in results:
        assert (unchanged, scaled, any_error) == (True, True, True)
        assert scale[0].startswith("ValueError: factor must be finite and above 0, not 0")
        assert scale[1].startswith("ValueError: factor")
        assert scale[2] == "no error"


def _arguments_differ():
    ddp = DistributedDataParallel(nn.Linear(2, 3))
    return _message(TopKCompression, ddp, ratio=0.01 * (1 + dist.get_rank()))


def test_arguments_that_differ_between_ranks_are_refused_on_each() -> None:
    for message in run_processes(_arguments_differ, 2):
        assert "'ratio': 0.02" in message
        assert "on rank 1 of its group" in message


def _backward(case):
    model = nn.Embedding(4, 2, sparse=True) if case == "sparse" else nn.Linear(4, 2)
    ddp = DistributedDataParallel(model)
    state = TopKCompression(ddp)
    if case == "other model":
        state = TopKCompression(DistributedDataParallel(nn.Linear(4, 2)))
    if case == "no state":
        state = None
    ddp.register_comm_hook(state, topk_hook)
    x = torch.tensor([1, 2]) if case == "sparse" else torch.ones(1, 4)
    ddp(x).sum().backward()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("sparse", "Create the embedding with sparse=False"),
        ("other model", "Register the hook with the model that TopKCompression was created with"),
        ("no state", "The state of topk_hook must be a TopKCompression, not NoneType"),
    ],
)
def test_wrong_registrations_are_refused_in_backward(case: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        run_processes(_backward, 1, case)
