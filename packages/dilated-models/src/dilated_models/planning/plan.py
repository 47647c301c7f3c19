"""`plan`: memory, FLOPs, bytes and time of a job on some hardware, and what binds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from dilated_core.positions.rotary import check_decay_range

from dilated_models.config import LongNetConfig
from dilated_models.longnet.saving import read_config
from dilated_models.longnet.size import count_parameters
from dilated_models.planning.attention import Work, work_of
from dilated_models.planning.hardware import AT_MOST, DATA_SHEETS, Hardware, hardware_named
from dilated_models.planning.job import Job
from dilated_models.planning.kinds import Branch, channels, dense_branches
from dilated_models.planning.memory import Memory, memory_of
from dilated_models.planning.operations import Operation, operations_of
from dilated_models.planning.traffic import Sent, seconds_to_send, sent_by_rank

Constraint = Literal["memory", "compute", "memory bandwidth", "operations", "network"]


class Seconds(NamedTuple):
    """Time of a step by what it is spent on.

    Attributes:
        compute: Matrix products and attention that are limited by FLOP/s.
        memory_bandwidth: Operations that are limited by reading and writing memory.
        operations: Starting operations, at the fewest.
        network: Sending, which runs beside the others.
    """

    compute: float
    memory_bandwidth: float
    operations: float
    network: float

    @property
    def total(self) -> float:
        """Of the step: sending overlaps with all else."""
        return max(self.compute + self.memory_bandwidth + self.operations, self.network)


class Change(NamedTuple):
    """What makes a job fit.

    Attributes:
        what: What to change, in words, each with its option.
        job: The changed job.
        memory_bytes: Of a rank, then.
        seconds: Of its step, then.
    """

    what: tuple[str, ...]
    job: Job
    memory_bytes: int
    seconds: float


class Dense(NamedTuple):
    """The same job with attention of every token to all tokens before it.

    Attributes:
        attention_flops: Of a step on a rank.
        seconds: Of a step.
    """

    attention_flops: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job needs on some hardware; `print` it for tables.

    All numbers are those of one rank, the one that has most to do.

    Attributes:
        job: What is computed.
        hardware: The device of each rank.
        parameters: Parameters of the model.
        memory: The largest memory, and when that is.
        operations: What is computed in a step.
        sent: What is sent in a step.
        balance: Mean over largest FLOPs of attention of the ranks that share a sequence.
        seconds: Expected time of a step.
        least_seconds: Its time at the full rates of the data sheet; None for measured hardware.
        dense: The same with dense attention.
        change: The cheapest change that makes it fit; None if it fits, or nothing helps.
    """

    job: Job
    hardware: Hardware
    parameters: int
    memory: Memory
    operations: tuple[Operation, ...]
    sent: tuple[Sent, ...]
    balance: float
    seconds: Seconds
    least_seconds: Seconds | None
    dense: Dense
    change: Change | None = None

    @property
    def fits(self) -> bool:
        """Whether the memory of a device suffices."""
        return self.memory.total <= self.hardware.memory_bytes

    @property
    def binding(self) -> Constraint:
        """What limits the job: memory if it does not fit, else what takes most of the time."""
        if not self.fits:
            return "memory"
        times: dict[Constraint, float] = {
            "compute": self.seconds.compute,
            "memory bandwidth": self.seconds.memory_bandwidth,
            "operations": self.seconds.operations,
            "network": self.seconds.network,
        }
        return max(times, key=lambda name: times[name])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the model would refuse at this length, apart from memory."""
        job, model = self.job, self.job.model
        if model.positions != "xpos" or job.mode in ("prefill", "decoding"):
            return ()
        dtype = torch.float16 if job.dtype == "float16" else torch.float32
        try:
            check_decay_range(job.seq_len // 2, model.xpos_scale_base, dtype)
        except ValueError as error:
            return (str(error),)
        return ()

    @property
    def flops(self) -> float:
        """Of a step, as `torch.utils.flop_counter.FlopCounterMode` counts."""
        return sum(x.flops for x in self.operations)

    @property
    def bytes_moved(self) -> float:
        """Read from and written to memory in a step."""
        return sum(x.bytes for x in self.operations)

    @property
    def bytes_sent(self) -> float:
        """Sent to other ranks in a step."""
        return sum(x.bytes for x in self.sent)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together: of the batch, or in decoding new ones."""
        job = self.job
        tokens = job.batch_size * (1 if job.mode == "decoding" else job.seq_len)
        return tokens / self.seconds.total

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON types."""
        job = {name: getattr(self.job, name) for name in Job.__slots__ if name != "model"}
        change = self.change
        return {
            "model": self.job.model.to_dict(),
            "job": job,
            "hardware": self.hardware.name,
            "sources": list(self.hardware.sources),
            "parameters": self.parameters,
            "fits": self.fits,
            "binding": self.binding,
            "memory": {
                "bytes": self.memory.total,
                "device_bytes": self.hardware.memory_bytes,
                "moment": self.memory.moment,
                "parts": dict(self.memory.parts),
            },
            "flops": self.flops,
            "bytes_moved": self.bytes_moved,
            "bytes_sent": {x.name: x.bytes for x in self.sent},
            "balance": self.balance,
            "notes": list(self.notes),
            "seconds": self.seconds._asdict() | {"total": self.seconds.total},
            "least_seconds": None if self.least_seconds is None else self.least_seconds.total,
            "tokens_per_second": self.tokens_per_second,
            "operations": [x._asdict() for x in self.operations],
            "dense_attention": self.dense._asdict(),
            "change": None
            if change is None
            else {
                "what": list(change.what),
                "bytes": change.memory_bytes,
                "seconds": change.seconds,
                "devices": change.job.devices,
            },
        }

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write the plan with plots as one HTML file that loads nothing else."""
        from dilated_models.planning.page import write_plan_page

        write_plan_page(self, Path(path))

    def __str__(self) -> str:
        from dilated_models.planning.table import plan_table

        return plan_table(self)


def plan(
    model: LongNetConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    hardware: str | Hardware = "h100-sxm",
    **options: Any,
) -> Plan:
    """What a model needs on some devices: memory, FLOPs, bytes and time, and what binds.

    Args:
        model: A `LongNetConfig`, its fields, or the folder of a training run.
        hardware: A name of a data sheet, such as `"a100-80gb"`, the path of a file that
            `dilated plan --calibrate` wrote, or a `Hardware`.
        **options: Fields of `dilated_models.planning.job.Job`; `seq_len` is required.

    Raises:
        TypeError, ValueError: If an option is wrong.

    Example:
        >>> config = LongNetConfig(num_tokens=32_000)
        >>> found = plan(config, seq_len=131_072, dtype="bfloat16", hardware="a100-40gb")
        >>> found.fits, found.binding
        (False, 'memory')
        >>> found.change.what
        ('recompute blocks in the backward pass (--checkpoint-activations)',)
    """
    if isinstance(model, str | os.PathLike):
        model = LongNetConfig.from_dict(read_config(Path(model))["model"])
    elif isinstance(model, Mapping):
        model = LongNetConfig.from_dict(model)
    device = hardware if isinstance(hardware, Hardware) else hardware_named(hardware)
    options.setdefault("on_gpu", device.name in DATA_SHEETS and device.name != "laptop")
    return plan_job(Job(model=model, **options), device)


def plan_job(job: Job, hardware: Hardware, *, with_change: bool = True) -> Plan:
    """The plan of a job.

    Args:
        job: The job.
        hardware: The device of each rank.
        with_change: Whether to find the cheapest change that makes it fit.

    Raises:
        ValueError: If the hardware does not run the dtype.
    """
    from dilated_models.planning.changes import cheapest_change

    if job.dtype not in hardware.products:
        raise ValueError(
            f"dtype is {job.dtype!r} and hardware is {hardware.name!r}; it must be one of "
            f"{', '.join(hardware.products)}, so use another dtype."
        )
    work = known_work(job)
    operations = tuple(operations_of(job, work))
    sent = tuple(sent_by_rank(job, work))
    least = None
    if hardware.name in DATA_SHEETS:
        least = _seconds(operations, sent, job, hardware_named(hardware.name, AT_MOST))
    found = Plan(
        job=job,
        hardware=hardware,
        parameters=count_parameters(job.model).total,
        memory=memory_of(job, work),
        operations=operations,
        sent=sent,
        balance=work.balance,
        seconds=_seconds(operations, sent, job, hardware),
        least_seconds=least,
        dense=_dense(job, hardware, work),
    )
    if found.fits or not with_change:
        return found
    return replace(found, change=cheapest_change(job, hardware))


@lru_cache(maxsize=256)
def known_work(job: Job) -> Work:
    """`work_of`, computed once for a job."""
    return work_of(job)


def seconds_of(job: Job, hardware: Hardware) -> Seconds:
    """Time of a step of a job."""
    work = known_work(job)
    return _seconds(operations_of(job, work), sent_by_rank(job, work), job, hardware)


def _seconds(
    operations: tuple[Operation, ...] | list[Operation],
    sent: tuple[Sent, ...] | list[Sent],
    job: Job,
    hardware: Hardware,
) -> Seconds:
    compute = bandwidth = starts = 0.0
    for x in operations:
        moving = x.bytes / hardware.memory.at(x.size if x.kind == "elementwise" else _LARGE)
        computing = _computing(x, job, hardware)
        compute += sum(count * hardware.number_s.get(name, 0.0) for name, count in x.numbers)
        compute += computing if computing >= moving else 0.0
        bandwidth += 0.0 if computing >= moving else moving
        starts += x.num_operations * hardware.operation_s
    return Seconds(compute, bandwidth, starts, seconds_to_send(list(sent), hardware))


_LARGE = 2.0**26  # bytes that no cache holds


def _computing(x: Operation, job: Job, hardware: Hardware) -> float:
    if x.kind == "elementwise":
        return 0.0
    if x.kind == "products":
        return x.flops / hardware.products[job.dtype].at(x.size)
    rates = (
        hardware.attention_backward
        if x.is_backward and "again" not in x.name
        else hardware.attention
    )
    head_dim = job.model.head_dim
    # A pair costs its products, and its exponential function whatever the width of a head.
    factor = (head_dim + hardware.attention_width) / head_dim
    return factor * x.flops / rates[job.dtype].at(x.size)


def _dense(job: Job, hardware: Hardware, work: Work) -> Dense:
    if job.mode == "decoding":
        flops = 4.0 * job.rows * job.model.d_model * job.seq_len
        branches = (Branch(job.seq_len, flops, 1.0),)
    else:
        head_dim = channels(job.model, job.dtype)
        branches = dense_branches(job.model, job.seq_len, job.rows, head_dim=head_dim)
        parts = -(-job.seq_len // job.prompt_part) if job.mode == "prefill" else 1
        # Ranks of a zigzag layout have equally much to do.
        share = 1 / job.cp / parts
        branches = tuple(x._replace(flops=x.flops * share) for x in branches)
    operations = operations_of(job, work._replace(branches=branches, products=()))
    flops = sum(x.flops for x in operations if x.kind == "attention")
    return Dense(flops, _seconds(operations, sent_by_rank(job, work), job, hardware).total)
