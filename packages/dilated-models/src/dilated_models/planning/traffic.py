"""Bytes that a rank sends in a step, and over which connection."""

from __future__ import annotations

from typing import NamedTuple

from dilated_models.longnet.size import count_parameters
from dilated_models.planning.attention import Work
from dilated_models.planning.hardware import Hardware
from dilated_models.planning.job import Job


class Sent(NamedTuple):
    """Bytes of one purpose.

    Attributes:
        name: The purpose.
        bytes: That the rank which sends most sends in a step.
        ranks: Neighbouring ranks that exchange them.
    """

    name: str
    bytes: float
    ranks: int


def sent_by_rank(job: Job, work: Work) -> list[Sent]:
    """What a rank sends in a step. Neighbouring ranks share a sequence, then parameters."""
    found: list[Sent] = []
    if job.cp > 1:
        layers = job.model.num_encoder_layers + job.model.num_decoder_layers
        blocks_with_cross = job.model.num_decoder_layers if job.has_cross else 0
        forward = layers * work.sent_forward + blocks_with_cross * work.cross_forward
        backward = layers * work.sent_backward + blocks_with_cross * work.cross_backward
        if job.mode == "training":
            forward *= 2 if job.model.activation_checkpointing else 1
            forward += backward
        sent = float(forward * job.accumulation)
        found.append(Sent("keys and values of shared sequences", sent, job.cp))
    size = float(job.parameter_itemsize * count_parameters(job.model).total)
    is_training = job.mode == "training"
    if (shards := job.shards) > 1:
        # Gathered for forward and once more for backward, which then spreads the sums of gradients.
        passes = (3 if is_training else 1) * job.accumulation
        each = size * (shards - 1) / shards
        found.append(Sent("parameters and gradients of shards", passes * each, shards))
    # Sums of gradients over replicas: each part travels to its sum and back.
    replicas = job.devices // shards
    if is_training and replicas > 1:
        each = 2 * size / shards * (replicas - 1) / replicas
        found.append(Sent("gradients of replicas", each, job.devices))
    return found


def seconds_to_send(sent: list[Sent], hardware: Hardware) -> float:
    """Time for all of it, by the connection that reaches the farthest of the ranks."""
    return sum(
        x.bytes
        / (
            hardware.node_bytes_per_s
            if x.ranks <= hardware.devices_per_node
            else hardware.network_bytes_per_s
        )
        for x in sent
    )
