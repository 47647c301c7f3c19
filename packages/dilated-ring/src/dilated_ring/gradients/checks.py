"""What `TopKCompression` refuses."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def check_arguments(ddp: object, ratio: object, max_tensors: object, feedback: object) -> None:
    """Raise for arguments of `TopKCompression` that it cannot honour."""
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"ddp must be a DistributedDataParallel, not {type(ddp).__name__}: its process group "
            "and the names of its parameters are needed. Wrap the model first."
        )
    if isinstance(ratio, bool) or not isinstance(ratio, float | int):
        raise TypeError(f"ratio must be a number, not {type(ratio).__name__}.")
    if not 0 < ratio <= 1:
        raise ValueError(
            f"ratio is the part of the gradients that is sent, above 0 and at most 1, not {ratio}. "
            "For 1 percent, pass 0.01."
        )
    if isinstance(max_tensors, bool) or not isinstance(max_tensors, int):
        raise TypeError(f"max_tensors must be an int, not {type(max_tensors).__name__}.")
    if max_tensors < 1:
        raise ValueError(f"max_tensors must be at least 1, not {max_tensors}.")
    if not isinstance(feedback, bool):
        raise TypeError(f"error_feedback must be a bool, not {type(feedback).__name__}.")


def check_same_on_all_ranks(arguments: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Raise on every rank: messages of different lengths end in errors of the network, or worse."""
    by_rank: list[Any] = [None] * group.size()
    dist.all_gather_object(by_rank, arguments, group=group)
    for rank, other in enumerate(by_rank):
        if other != by_rank[0]:
            raise ValueError(
                f"TopKCompression has {other} on rank {rank} of its group, but {by_rank[0]} on "
                "rank 0. Pass the same arguments on all ranks."
            )


def errors_of_rank(state_dict: object, key: str, size: int) -> dict[str, Any]:
    """What a state contains for the rank of this key, if it comes from `size` ranks."""
    if not isinstance(state_dict, dict):
        raise TypeError(f"state_dict must be a dict, not {type(state_dict).__name__}.")
    state = cast(dict[str, Any], state_dict)
    if state.get("world_size") != size:
        raise ValueError(
            f"This state was saved on {state.get('world_size')} ranks and cannot be loaded on "
            f"{size}: each rank has errors of its own. Continue on as many ranks as before, or "
            "without this state."
        )
    if key not in state or len(state) != 2:
        raise ValueError(
            f"This state has the keys {sorted(state)}, not 'world_size' and {key!r}. Load on each "
            "rank the state that the same rank saved."
        )
    if not isinstance(state[key], dict):
        raise TypeError(f"{key} must be a dict of errors, not {type(state[key]).__name__}.")
    return cast(dict[str, Any], state[key])


def check_errors(errors: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """Raise unless names, shapes and dtypes of the errors are as expected."""
    missing, unexpected = sorted(expected - errors.keys()), sorted(errors.keys() - expected)
    if missing or unexpected:
        raise ValueError(
            f"This state belongs to another model: it lacks the parameters {missing}, and has "
            f"{unexpected} that the model does not train."
        )
    for name, like in expected.items():
        error = errors[name]
        if not isinstance(error, torch.Tensor):
            raise TypeError(f"The error of {name} must be a tensor, not {type(error).__name__}.")
        if error.shape != like.shape or error.dtype != like.dtype:
            raise ValueError(
                f"The error of {name} is {error.dtype} of shape {list(error.shape)}, but must be "
                f"{like.dtype} of shape {list(like.shape)}."
            )
