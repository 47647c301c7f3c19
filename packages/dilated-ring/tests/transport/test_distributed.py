"""Messages over gloo: groups that are not ranks 0..n, several at once, bf16, empty messages."""

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring.transport import DistributedTransport, Transport


def _ring(transport: Transport, value: torch.Tensor, step: str) -> torch.Tensor:
    """The value of the left neighbour."""
    (rank,) = transport.hosted
    right, left = (rank + 1) % transport.size, (rank - 1) % transport.size
    pending = transport.start(rank, {right: value}, {left: torch.empty_like(value)}, step=step)
    return pending.wait()[left]


def _exchange() -> dict[str, object]:
    world = DistributedTransport()
    rank = dist.get_rank()
    result: dict[str, object] = {}

    # All to all, with two dtypes one after the other.
    for dtype in (torch.float32, torch.bfloat16):
        sends = {p: torch.full((2, 3), 10 * rank + p, dtype=dtype) for p in range(3) if p != rank}
        receives = {p: torch.empty(2, 3, dtype=dtype) for p in range(3) if p != rank}
        came = world.start(rank, sends, receives, step="all").wait()
        assert all(came[p] is receives[p] for p in receives)
        result[str(dtype)] = {p: t.float().unique().tolist() for p, t in came.items()}
    result["bytes"] = world.sent_bytes

    # Steps in flight together meet by their names, whatever their order.
    steps = ["a", "b"] if rank == 0 else ["b", "a"]
    pending = {
        step: world.start(
            rank,
            {(rank + 1) % 3: torch.tensor([rank, ord(step)])},
            {(rank - 1) % 3: torch.zeros(2, dtype=torch.long)},
            step=step,
        )
        for step in steps
    }
    result["steps"] = {s: pending[s].wait()[(rank - 1) % 3].tolist() for s in ("a", "b")}

    # Empty messages and a rank without messages.
    sends = {1: torch.empty(0, 3), 2: torch.ones(1)} if rank == 0 else {}
    receives = {1: {0: torch.empty(0, 3)}, 2: {0: torch.zeros(1)}}.get(rank, {})
    came = world.start(rank, sends, receives, step="uneven").wait()
    result["uneven"] = {p: t.tolist() for p, t in came.items()}

    result["gathered"] = [t.tolist() for t in world.all_gather(rank, torch.tensor([rank, 7]))]
    result["bytes after gathering"] = world.sent_bytes
    return result


def test_messages_between_three_ranks() -> None:
    for rank, result in enumerate(run_processes(_exchange, 3)):
        others = [p for p in range(3) if p != rank]
        for dtype in ("torch.float32", "torch.bfloat16"):
            assert result[dtype] == {p: [10.0 * p + rank] for p in others}
        # Two messages of 6 numbers, of 4 bytes and of 2.
        assert result["bytes"] == 2 * 6 * 4 + 2 * 6 * 2
        left = (rank - 1) % 3
        assert result["steps"] == {"a": [left, ord("a")], "b": [left, ord("b")]}
        assert result["uneven"] == {0: {}, 1: {0: []}, 2: {0: [1.0]}}[rank]
        assert result["gathered"] == [[0, 7], [1, 7], [2, 7]]
        assert result["bytes after gathering"] == result["bytes"] + 16 * 2 + (rank == 0) * 4


def _exchange_in_groups() -> list[list[int]]:
    rank = dist.get_rank()
    # A 2 x 2 mesh with rings across (0, 2), (1, 3) and along (0, 1), (2, 3), and a second
    # group of all ranks.
    groups = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3], [0, 1], [2, 3])]
    twin = dist.new_group([0, 1, 2, 3])
    mine = [groups[rank % 2], groups[2 + rank // 2], twin, dist.group.WORLD]
    transports = [DistributedTransport(group) for group in mine]
    pending = []
    for index, transport in enumerate(transports):
        (own,) = transport.hosted
        assert own == dist.get_group_rank(mine[index], rank)
        size = transport.size
        value = torch.tensor([index, rank])
        # The same step name everywhere: groups alone keep the messages apart.
        pending.append(
            transport.start(
                own,
                {(own + 1) % size: value},
                {(own - 1) % size: torch.zeros_like(value)},
                step="hop",
            )
        )
    # Waited for in the opposite order.
    received = [next(iter(p.wait().values())).tolist() for p in reversed(pending)]
    gathered = [
        [t.item() for t in transport.all_gather(transport.hosted[0], torch.tensor(rank))]
        for transport in transports
    ]
    ordered = [dist.get_process_group_ranks(group) for group in mine]
    assert gathered == ordered, (gathered, ordered)
    return received[::-1]


def test_several_groups_at_once_do_not_mix() -> None:
    results = run_processes(_exchange_in_groups, 4)
    for rank, received in enumerate(results):
        left = [rank ^ 2, rank ^ 1, (rank - 1) % 4, (rank - 1) % 4]
        assert received == [[index, left[index]] for index in range(4)]


def _outside() -> str:
    group = dist.new_group([0])
    if dist.get_rank() == 0:
        assert DistributedTransport(group).all_gather(0, torch.ones(1))[0].item() == 1
        return ""
    with pytest.raises(ValueError) as raised:
        DistributedTransport(group)
    return str(raised.value)


def test_a_rank_outside_the_group_is_refused() -> None:
    assert "group does not include rank 1" in run_processes(_outside, 2)[1]
