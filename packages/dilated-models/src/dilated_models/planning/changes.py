"""The cheapest change that makes a job fit into the memory of its devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from dilated_models.planning.hardware import Hardware
from dilated_models.planning.job import Job
from dilated_models.planning.memory import memory_of
from dilated_models.planning.plan import Change, known_work, seconds_of

_MOST_DEVICES = 1 << 20
_MOST_TRIED = 64  # jobs of one number of devices whose time is compared


class _Step(NamedTuple):
    """One change of a job.

    Attributes:
        kind: Changes of one kind exclude each other.
        what: In words, with its option.
        job: The changed job.
    """

    kind: str
    what: str
    job: Job


def cheapest_change(job: Job, hardware: Hardware) -> Change | None:
    """The fewest changes that make the job fit, and among as few those of the shortest step.

    Changes on the same devices come first, then more devices, doubled until the job fits.
    """
    devices = job.devices
    while devices <= _MOST_DEVICES:
        starts = _with_devices(job, devices)
        found = [
            change
            for start in starts
            for change in _changes(start, hardware)
            if not (devices == job.devices and not change.what)
        ]
        if found:
            fewest = min(len(change.what) for change in found)
            few = [change for change in found if len(change.what) == fewest]
            return min(few, key=lambda change: change.seconds)
        devices *= 2
    return None


def _with_devices(job: Job, devices: int) -> Iterator[_Step]:
    """The job on so many devices: with more ranks for each sequence, or for rows."""
    if devices == job.devices:
        yield _Step("", "", job)
        return
    times = devices // job.devices
    if job.mode in ("training", "forward"):
        cp = job.cp * times
        if cp <= job.seq_len and (more := _changed(job, devices=devices, cp=cp)) is not None:
            text = f"use {devices:,} devices with {cp:,} for each sequence (--devices, --cp)"
            yield _Step("devices", text, more)
    more = _changed(job, devices=devices)
    if more is not None:
        yield _Step("devices", f"use {devices:,} devices (--devices)", more)


def _changes(start: _Step, hardware: Hardware) -> list[Change]:
    """All combinations of the fewest changes that make a job fit."""
    first = (start.what,) if start.what else ()
    if _fits(start.job, hardware):
        return [_change(first, start.job, hardware)]
    singles = list(_single_changes(start.job, hardware))
    kinds = {step.kind for step in singles}
    for count in range(1, len(kinds) + 1):
        found: list[Change] = []
        for chosen in combinations(singles, count):
            if len({step.kind for step in chosen}) < count or len(found) >= _MOST_TRIED:
                continue
            job = _combined(start.job, chosen)
            if job is not None and _fits(job, hardware):
                what = first + tuple(step.what for step in chosen)
                found.append(_change(what, job, hardware))
        if found:
            return found
    return []


def _single_changes(job: Job, hardware: Hardware) -> Iterator[_Step]:
    """Changes on the same devices."""
    if job.mode == "training":
        if not job.chunked_loss:
            yield _Step(
                "loss",
                "compute the loss in chunks (without --whole-logits)",
                job.replace(chunked_loss=True),
            )
        if not job.model.activation_checkpointing:
            model = dataclasses.replace(job.model, activation_checkpointing=True)
            text = "recompute blocks in the backward pass (--checkpoint-activations)"
            yield _Step("recompute", text, job.replace(model=model))
        factor = 2
        while job.rows % factor == 0:
            parts = job.accumulation * factor
            text = f"compute a batch in {parts:,} parts (--accumulation {parts})"
            yield _Step("rows", text, job.replace(accumulation=parts))
            factor *= 2
    if job.dtype == "float32" and "bfloat16" in hardware.products:
        yield _Step("dtype", "use bfloat16 (--dtype bfloat16)", job.replace(dtype="bfloat16"))
    if job.mode in ("training", "forward"):
        if job.devices > 1 and not job.fsdp:
            text = "spread parameters over the ranks (--fsdp)"
            yield _Step("fsdp", text, job.replace(fsdp=True))
        times = 2
        # With as many parts more, each rank has fewer tokens at once and the batch is the same.
        while job.mode == "training" and job.devices % (times * job.cp) == 0:
            cp, parts = times * job.cp, times * job.accumulation
            if cp <= job.seq_len and (more := _changed(job, cp=cp, accumulation=parts)) is not None:
                text = (
                    f"share each sequence among {cp:,} ranks, in {parts:,} parts "
                    f"(--cp {cp} --accumulation {parts})"
                )
                yield _Step("rows", text, more)
            times *= 2
    if job.mode in ("prefill", "decoding") and job.batch_size > job.dp:
        fewer = job.dp
        text = f"decode fewer texts at a time (--batch-size {fewer})"
        yield _Step("rows", text, job.replace(batch_size=fewer))


def _changed(job: Job, **fields: int) -> Job | None:
    """The job with other fields; None if they contradict each other."""
    try:
        return job.replace(**fields)
    except ValueError:
        return None


def _combined(job: Job, steps: tuple[_Step, ...]) -> Job | None:
    """A job with the changes of several steps, each of which was made from `job`."""
    fields = {
        field.name: getattr(step.job, field.name)
        for step in steps
        for field in dataclasses.fields(Job)
        if getattr(step.job, field.name) != getattr(job, field.name)
    }
    try:
        return job.replace(**fields)
    except ValueError:
        return None


def _fits(job: Job, hardware: Hardware) -> bool:
    return memory_of(job, known_work(job)).total <= hardware.memory_bytes


def _change(what: tuple[str, ...], job: Job, hardware: Hardware) -> Change:
    work = known_work(job)
    return Change(what, job, memory_of(job, work).total, seconds_of(job, hardware).total)
