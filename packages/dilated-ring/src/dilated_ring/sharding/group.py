"""Which ranks share one sequence, and which of them this process is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from dilated_ring.transport import DisagreementError, DistributedTransport, reporting_failures

# What users pass as `group`.
Group: TypeAlias = "dist.ProcessGroup | DeviceMesh | None"


@dataclass(frozen=True, slots=True)
class RankGroup:
    """The ranks that share one sequence.

    Attributes:
        rank: Of this process, counted within the group.
        size: How many ranks.
        process_group: For collectives; None for a group of one, which needs none. Collectives of
            torch.distributed take a rank of this group as `group_src` or `group_dst`.
    """

    rank: int
    size: int
    process_group: dist.ProcessGroup | None


def resolve_group(group: Group) -> RankGroup:
    """The ranks that `group` stands for.

    Example:
        >>> resolve_group(None)  # without torch.distributed
        RankGroup(rank=0, size=1, process_group=None)

    Args:
        group: A ProcessGroup of any ranks. A DeviceMesh: its dimension "cp", or its only dimension.
            None: the default group, or a group of one if torch.distributed is not initialised.

    Raises:
        TypeError: If it is anything else.
        ValueError: If this process is not in the group, or a mesh of several dimensions has none
            named "cp".
    """
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return RankGroup(0, 1, None)
        return _member_of(dist.group.WORLD)
    if isinstance(group, DeviceMesh):
        return _member_of(_group_of_mesh(group))
    # What torch.distributed.new_group returns to a process that it leaves out.
    if isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER:
        return _member_of(group)
    raise TypeError(
        f"group is a {type(group).__name__}; it must be a ProcessGroup, a DeviceMesh or None for "
        f"the default group."
    )


def _group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup | None:
    names = mesh.mesh_dim_names or ()
    if mesh.get_coordinate() is None:
        return None
    if "cp" in names:
        return mesh.get_group("cp")
    if mesh.ndim == 1:
        return mesh.get_group()
    raise ValueError(
        f"group is a DeviceMesh of shape {tuple(mesh.shape)} with the dimensions "
        f"{', '.join(map(repr, names)) or 'unnamed'}; it must have one dimension or one named "
        f"'cp', so pass mesh[name] of the dimension that shares a sequence."
    )


def _member_of(process_group: object) -> RankGroup:
    """The group as this process sees it."""
    # Not a ProcessGroup: what new_group and a mesh return to a process that they leave out.
    if not isinstance(process_group, dist.ProcessGroup) or dist.get_rank(process_group) < 0:
        raise ValueError(
            f"group does not include this process, rank {dist.get_rank()} of the default group; "
            f"call only on the ranks of the group, or pass the group that this process is in."
        )
    size = dist.get_world_size(process_group)
    return RankGroup(dist.get_rank(process_group), size, process_group if size > 1 else None)


def resolve_pair(groups: tuple[Group, Group]) -> tuple[RankGroup, RankGroup]:
    """The ranks across nodes and those inside this one.

    Raises:
        TypeError, ValueError: As of `resolve_group`; if it is no pair.
    """
    if len(groups) != 2:
        raise ValueError(
            f"group is a tuple of {len(groups)}; it must be a pair (across, inside) of groups."
        )
    across, inside = groups
    return resolve_group(across), resolve_group(inside)


def group_of_pair(groups: tuple[Group, Group]) -> Group:
    """All ranks of a pair (across, inside) as one group, for functions that take one group.

    Rank j inside node i is rank i · (size of inside) + j. All ranks of the pair make the first call
    together, in which they create the group; it is kept as long as the groups of the pair.

    Raises:
        TypeError, ValueError: As of `resolve_pair`; if nodes have different numbers of ranks, or
            ranks do not ascend from node to node.
    """
    across, inside = resolve_pair(groups)
    if across.process_group is None:
        return groups[1]
    if inside.process_group is None:
        return groups[0]
    kept = _groups_of_pairs.setdefault(across.process_group, WeakKeyDictionary())
    if inside.process_group not in kept:
        kept[inside.process_group] = _created(across, inside.process_group)
    return kept[inside.process_group]


_groups_of_pairs: WeakKeyDictionary[
    dist.ProcessGroup, WeakKeyDictionary[dist.ProcessGroup, dist.ProcessGroup]
] = WeakKeyDictionary()


def _created(across: RankGroup, inside: dist.ProcessGroup) -> dist.ProcessGroup:
    assert across.process_group is not None
    transport = DistributedTransport(across.process_group)
    names = torch.tensor(dist.get_process_group_ranks(inside), device="cpu")
    with reporting_failures(transport, across.rank):
        sizes = transport.all_gather(across.rank, torch.tensor(len(names), device="cpu"))
        if len(set(map(int, sizes))) > 1:
            raise DisagreementError(
                f"the nodes have {list(map(int, sizes))} ranks in their group inside; all must "
                f"have as many."
            )
        nodes = transport.all_gather(across.rank, names)
    ranks = [int(name) for node in nodes for name in node]
    if ranks != sorted(ranks):
        raise DisagreementError(
            f"the ranks of the pair of groups are {ranks}, node by node; they must ascend, so make "
            f"the nodes the first dimension of the mesh."
        )
    if ranks == list(range(dist.get_world_size())):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    # The ranks of other pairs need not call.
    created = dist.new_group(ranks, use_local_synchronization=True)
    assert isinstance(created, dist.ProcessGroup)
    return created
