"""Groups: what each kind of `group` stands for on each rank, and what is refused."""

import pytest
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring.sharding.group import RankGroup, group_of_pair, resolve_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def _error(function, *args):
    try:
        function(*args)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def _numbers(group):
    found = resolve_group(group)
    assert (found.process_group is None) == (found.size == 1)
    if found.process_group is not None:
        assert dist.get_world_size(found.process_group) == found.size
    return found.rank, found.size


def _groups_of_four():
    rank = dist.get_rank()
    halves = [dist.new_group([3, 1]), dist.new_group([0, 2])]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    unnamed = init_device_mesh("cpu", (2, 2))
    line = init_device_mesh("cpu", (4,))
    return {
        "default": _numbers(None),
        "own half": _numbers(halves[0 if rank in (1, 3) else 1]),
        "other half": _error(resolve_group, halves[1 if rank in (1, 3) else 0]),
        "alone": [_numbers(g) if r == rank else None for r in range(4) for g in [_alone(r)]],
        "mesh": _numbers(mesh),
        # Not mesh["dp"]: slicing a mesh imports torch.fx, which takes seconds in each process.
        "dimension": _numbers(DeviceMesh.from_group(mesh.get_group("dp"), "cpu")),
        "line": _numbers(line),
        "part": _error(resolve_group, DeviceMesh("cpu", [0, 1])),
        "unnamed": _error(resolve_group, unnamed),
        "without cp": _error(resolve_group, init_device_mesh("cpu", (2, 2), mesh_dim_names="ab")),
    }


def _alone(rank):
    return dist.new_group([rank])


def test_one_process_is_a_group_of_one() -> None:
    assert resolve_group(None) == RankGroup(0, 1, None)


@pytest.mark.parametrize("group", ["cp", 4, [0, 1]])
def test_other_values_are_refused(group: object) -> None:
    with pytest.raises(TypeError, match="must be a ProcessGroup, a DeviceMesh or None"):
        resolve_group(group)  # pyright: ignore[reportArgumentType]


def test_groups_of_four_ranks() -> None:
    results = run_processes(_groups_of_four, 4)
    for rank, result in enumerate(results):
        assert result["default"] == (rank, 4)
        assert result["line"] == (rank, 4)
        # Ranks of a group are numbered in ascending order of global ranks: new_group sorts them.
        assert result["own half"] == (rank // 2, 2)
        assert result["other half"] == (
            f"ValueError: group does not include this process, rank {rank} of the default group; "
            f"call only on the ranks of the group, or pass the group that this process is in."
        )
        assert result["alone"][rank] == (0, 1)
        assert result["mesh"] == (rank % 2, 2)
        assert result["dimension"] == (rank // 2, 2)
        expected = "no error" if rank < 2 else "ValueError: group does not include this process"
        assert result["part"].startswith(expected)
        assert "dimensions unnamed; it must have one dimension" in result["unnamed"]
        assert "dimensions 'a', 'b'; it must have" in result["without cp"]


def _pairs_of_five():
    """Ranks 1 to 4 are two nodes; rank 0 takes no part."""
    rank = dist.get_rank()
    rows = [dist.new_group(ranks) for ranks in ([1, 2], [3, 4])]
    columns = [dist.new_group(ranks) for ranks in ([1, 3], [2, 4])]
    alone = [_alone(r) for r in range(5)]
    if rank == 0:
        return {"world": _numbers(group_of_pair((None, alone[0])))}
    inside, across = rows[(rank - 1) // 2], columns[(rank - 1) % 2]
    whole = group_of_pair((across, inside))
    assert group_of_pair((across, inside)) is whole
    return {
        "world": _numbers(group_of_pair((None, alone[rank]))),
        "whole": (*_numbers(whole), dist.get_process_group_ranks(whole)),
        "one node": group_of_pair((alone[rank], inside)) is inside,
        "one rank in each": group_of_pair((across, alone[rank])) is across,
        "other order": _error(group_of_pair, (inside, across)),
        "three": _error(group_of_pair, (inside, across, None)),
    }


def test_a_pair_of_groups_as_one_group() -> None:
    results = run_processes(_pairs_of_five, 5)
    for rank, found in enumerate(results):
        assert found["world"] == (rank, 5)
    for rank, found in enumerate(results[1:]):
        assert found["whole"] == (rank, 4, [1, 2, 3, 4])
        assert found["one node"] is found["one rank in each"] is True
        assert "are [1, 3, 2, 4], node by node; they must ascend" in found["other order"]
        assert "group is a tuple of 3; it must be a pair" in found["three"]
