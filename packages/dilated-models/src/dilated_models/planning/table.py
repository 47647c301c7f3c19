"""A plan as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_models.planning.plan import Plan

_BINDS = {
    "memory": "memory: the job does not fit",
    "compute": "compute: FLOP/s of products and attention",
    "memory bandwidth": "memory bandwidth: reading and writing of elementwise operations",
    "operations": "starting operations, which are too small for this hardware",
    "network": "network: sending between ranks",
}


def plan_table(plan: Plan) -> str:
    """The plan as tables of memory, time, FLOPs and bytes."""
    lines = [*_heading(plan), "", *_memory(plan), "", *_time(plan), "", *_work(plan)]
    lines += ["", f"binding: {_BINDS[plan.binding]}"]
    if not plan.fits:
        lines += _change(plan)
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def _heading(plan: Plan) -> list[str]:
    job, model = plan.job, plan.job.model
    kind = model.attention_kind
    layers = model.num_encoder_layers + model.num_decoder_layers
    if kind == "dilated":
        branches = " ".join(f"{w:,}/{r:,}" for w, r in model.pattern.branches)
        kind = f"segments/rates {branches}"
    spread = "" if job.devices == 1 else f", dp {job.dp:,} × cp {job.cp:,}"
    spread += (
        ", FSDP" if job.fsdp else ", DDP" if job.devices > 1 and job.mode == "training" else ""
    )
    parts = f" in {job.accumulation:,} parts" if job.accumulation > 1 else ""
    options = [
        *(
            ["blocks recomputed"]
            if model.activation_checkpointing and job.mode == "training"
            else []
        ),
        *([] if job.chunked_loss else ["whole logits"]),
    ]
    return [
        f"model     {plan.parameters / 1e6:,.1f}M parameters, {layers} layers of "
        f"{model.d_model}, {model.num_tokens:,} tokens, {kind}",
        f"job       {job.mode}, {job.batch_size:,} rows of {job.seq_len:,} tokens{parts}, "
        + ", ".join([job.dtype, *options]),
        f"hardware  {job.devices:,} × {plan.hardware.name}{spread}",
    ]


def _memory(plan: Plan) -> list[str]:
    memory, limit = plan.memory, plan.hardware.memory_bytes
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    verdict = "fits" if plan.fits else "does not fit"
    return [
        f"memory of a rank, largest in {memory.moment}"
        if memory.moment.startswith("the ")
        else f"memory of a rank, largest while {memory.moment}",
        *columns([[name, gigabytes(size)] for name, size in parts]),
        f"  together {gigabytes(memory.total)} of {gigabytes(limit)}: {verdict}",
    ]


def _time(plan: Plan) -> list[str]:
    seconds = plan.seconds
    what = "token of each row" if plan.job.mode == "decoding" else "step"
    rows = [
        ["compute", duration(seconds.compute)],
        ["memory bandwidth", duration(seconds.memory_bandwidth)],
        ["starting operations", duration(seconds.operations)],
    ]
    if plan.sent:
        rows.append(["network, meanwhile", duration(seconds.network)])
    least = plan.least_seconds
    beside = (
        "" if least is None else f"; at the full rates of the data sheet {duration(least.total)}"
    )
    return [
        f"time of a {what}: {duration(seconds.total)}, {plan.tokens_per_second:,.0f} tokens/s on "
        f"all devices{beside}",
        *columns(rows),
    ]


def _work(plan: Plan) -> list[str]:
    attention = sum(x.flops for x in plan.operations if x.kind == "attention")
    rows = [
        ["FLOPs", f"{plan.flops:.3g}, {attention / plan.flops:.0%} in attention"],
        ["bytes moved", gigabytes(plan.bytes_moved)],
        *([x.name, gigabytes(x.bytes)] for x in plan.sent),
    ]
    if plan.job.cp > 1:
        rows.append(["balance of attention", f"{plan.balance:.2f} (mean over largest FLOPs)"])
    ratio = plan.dense.attention_flops / max(attention, 1.0)
    rows.append(
        ["dense attention", f"{ratio:,.3g} × FLOPs in attention, {duration(plan.dense.seconds)}"]
    )
    return ["a rank in a step", *columns(rows)]


def _change(plan: Plan) -> list[str]:
    change = plan.change
    if change is None:
        return ["no change that this command knows makes it fit; use a smaller model or seq_len"]
    return [
        "cheapest change that makes it fit: " + ", and ".join(change.what),
        f"  then {gigabytes(change.memory_bytes)} of a rank, {duration(change.seconds)}",
    ]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names on the left, values beside them."""
    width = max(len(row[0]) for row in rows)
    return [f"  {name:<{width}}  {value}" for name, value in rows]


def gigabytes(num_bytes: float) -> str:
    """Bytes with a unit, three digits: 10^9 bytes are a GB, as in data sheets.

    Example:
        >>> gigabytes(1_234_000_000)
        '1.23 GB'
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        units.pop(0)
    return f"{num_bytes:.3g} {units[0]}" if num_bytes < 999.5 else f"{num_bytes:,.0f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds with a unit, three digits.

    Example:
        >>> duration(0.0123), duration(90.0), duration(10_000.0)
        ('12.3 ms', '90 s', '2.78 h')
    """
    if seconds >= 86_400:
        return (
            f"{seconds / 86_400:,.3g} days" if seconds < 8.64e7 else f"{seconds / 86_400:,.0f} days"
        )
    if seconds >= 3600:
        return f"{seconds / 3600:.3g} h"
    if seconds >= 1:
        return f"{seconds:.0f} s" if seconds >= 99.5 else f"{seconds:.3g} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
