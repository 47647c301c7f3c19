"""Calls that some ranks make otherwise than the others: every rank ends in time, with the cause."""

import threading
from typing import Any

import torch
import torch.distributed as dist
from dilated_core import DilatedPattern
from dilated_core.testing.processes import run_processes
from dilated_ring import DistributedRingAttention, ring_dilated_attention
from dilated_ring.modules import health
from torch.distributed.device_mesh import init_device_mesh

PATTERN = DilatedPattern([10, 40], [1, 2])
# For ranks that wait for a call that never comes; elsewhere a busy machine has time.
_SHORT_S = 3.0


def attend(length: int = 10, **options: Any) -> str:
    """The error of a call, forward and backward."""
    x = torch.ones(1, length, 4, 8, requires_grad=True)
    run_backward = options.pop("run_backward", True)
    try:
        out = ring_dilated_attention(x, x, x, PATTERN, **({"timeout_s": 60.0} | options))
        if run_backward:
            out.sum().backward()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def a_rank_with_another_length() -> str:
    rank = dist.get_rank()
    return attend(seq_len=18 if rank == 1 else 20, group=dist.new_group())


def test_a_wrong_given_length_reaches_the_other_ranks_at_once() -> None:
    other, mistaken = run_processes(a_rank_with_another_length, 2)
    text = "ValueError: rank 1 holds 10 positions; of 18 in the layout 'contiguous' over 2 ranks"
    assert mistaken.startswith(text)
    assert other.startswith(f"RankFailure: rank 1 failed: {text}")


def a_node_with_a_mistake() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("across", "inside"))
    group, rank = (mesh["across"], mesh["inside"]), dist.get_rank()
    mistakes: list[dict[str, Any]] = [
        {"dropout_p": 1.5 if rank == 1 else 0.0},
        {"exchange": "all_to_all" if rank < 2 else "ring"},
        {"exchange": "all_to_all"},
    ]
    return [*(attend(group=group, **mistake) for mistake in mistakes), attend(group=group)]


def test_a_mistake_in_one_node_raises_on_all_nodes() -> None:
    """The groups stay usable: the right call at the end succeeds."""
    for one, node, alike, right in run_processes(a_node_with_a_mistake, 4):
        assert one.startswith("DisagreementError")
        assert "arguments is valid on rank 0; ValueError: dropout_p is 1.5" in one
        assert "is_causal" not in one
        assert node.startswith("DisagreementError: The ranks of the group differ: arguments is ex")
        assert alike.startswith("ValueError: exchange is 'all_to_all' and group a pair of groups")
        assert right == "no error"


def a_rank_without_backward() -> str:
    group, rank = dist.new_group(), dist.get_rank()
    first = attend(group=group, run_backward=rank != 1, timeout_s=_SHORT_S)
    return first + attend(group=group, timeout_s=_SHORT_S)


def test_a_rank_that_skips_backward_is_named() -> None:
    skipped = "RankFailure: rank 1 failed: it did not run the backward pass that rank 0 runs; "
    for message in run_processes(a_rank_without_backward, 2):
        assert skipped in message
        assert "their plans or messages differ" in message
        assert "a backward pass, step 'step 1 of 1 with rows of k and v'" in message
        assert "agreement of all ranks" in message


def a_rank_out_of_memory_in_a_check() -> str:
    """Rank 1 fails while it counts values, before it sends their number."""
    x, ring = torch.ones(1, 10, 4, 8), DistributedRingAttention([10], [1], group=dist.new_group())
    dist.barrier()  # the connections of the group must stand before one breaks
    if dist.get_rank() == 1:

        def fail(*_: Any) -> int:
            raise MemoryError("no memory for a mask")

        health._not_finite = fail
    try:
        ring(x, x, x)
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_rank_that_fails_in_a_check_of_values_is_named() -> None:
    first, second = run_processes(a_rank_out_of_memory_in_a_check, 2)
    assert second == "MemoryError: no memory for a mask"
    assert first.startswith(f"RankFailure: rank 1 failed: {second}")


def two_threads() -> list[str]:
    """Both threads call at once, until one call begins within another."""
    group, messages = dist.new_group(), []
    barrier = threading.Barrier(2)

    def work() -> None:
        barrier.wait()
        while not messages:
            message = attend(group=group, seq_len=20, timeout_s=_SHORT_S)
            if message != "no error":
                messages.append(message)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return messages


def test_two_threads_with_one_group_are_refused() -> None:
    for messages in run_processes(two_threads, 2):
        assert any("two threads use one group" in message for message in messages)
