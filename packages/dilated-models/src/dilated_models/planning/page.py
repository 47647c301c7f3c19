"""A plan with plots as one HTML page that loads nothing."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dilated_core.atomic_write import write_atomically

from dilated_models.planning.job import Job
from dilated_models.planning.memory import memory_of
from dilated_models.planning.plan import Plan, known_work, seconds_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STEPS = 4  # doublings and halvings of the length
_FEW_STEPS = 2  # for many ranks, whose exchange takes seconds to plan
_MANY_RANKS = 64
_SHORTEST = 64
_PAGE = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font-family: sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ overflow-x: auto; background: #f4f4f4; padding: 1rem; }}
svg {{ max-width: 100%; height: auto; }}
</style>
<h1>{title}</h1>
<pre>{table}</pre>
{plots}
<p>Sources of the hardware's figures: {sources}</p>
</html>
"""


def write_plan_page(plan: Plan, path: Path) -> None:
    """Write the page; `path` is whole or unchanged."""
    sources = " ".join(
        f'<a href="{html.escape(x)}">{html.escape(x)}</a>'
        if x.startswith("http")
        else html.escape(x)
        for x in plan.hardware.sources
    )
    text = _PAGE.format(
        title=html.escape(
            f"{plan.job.mode} of {plan.job.seq_len:,} tokens on {plan.hardware.name}"
        ),
        table=html.escape(str(plan)),
        plots=_plots(plan),
        sources=sources,
    )
    with write_atomically(path) as part:
        part.write_text(text, "utf-8")


def _plots(plan: Plan) -> str:
    """Memory and time by their parts, and both over the length, as SVG."""
    # Imported here: matplotlib is part of the extra `cli`. A Figure needs no display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    FigureCanvasSVG(figure)
    (parts, times), (memory, length) = figure.subplots(2, 2)
    limit = plan.hardware.memory_bytes / 1e9
    _bars(parts, {name: size / 1e9 for name, size in plan.memory.parts.items()})
    parts.axvline(limit, color="tab:red", linestyle="--", label="memory of a device")
    parts.set(title="Memory of a rank", xlabel="GB")
    parts.legend()
    seconds = {name.replace("_", " "): x for name, x in plan.seconds._asdict().items() if x}
    _bars(times, seconds)
    times.set(title="Time of a step", xlabel="seconds")
    jobs = list(_over_lengths(plan.job))
    lengths = [job.seq_len for job in jobs]
    held = [memory_of(job, known_work(job)).total / 1e9 for job in jobs]
    memory.plot(lengths, held, "o-")
    memory.axhline(limit, color="tab:red", linestyle="--", label="memory of a device")
    memory.set(title="Memory of a rank over the length", xlabel="tokens of a row", ylabel="GB")
    memory.legend()
    length.plot(lengths, [seconds_of(job, plan.hardware).total for job in jobs], "o-")
    length.set(title="Time of a step over the length", xlabel="tokens of a row", ylabel="seconds")
    for axes in (memory, length):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]  # without the document type, which names an address


def _bars(axes: Axes, values: dict[str, float]) -> None:
    names: Sequence[str] = sorted(values, key=lambda name: values[name])
    axes.barh(names, [values[name] for name in names], color="tab:blue")


def _over_lengths(job: Job) -> list[Job]:
    """The job with shorter and longer rows."""
    steps = _STEPS if job.cp < _MANY_RANKS else _FEW_STEPS
    lengths = {int(job.seq_len * 2.0**k) for k in range(-steps, steps + 1)}
    shortest = max(_SHORTEST, job.cp)
    return [job.replace(seq_len=n) for n in sorted(lengths | {job.seq_len}) if n >= shortest] or [
        job
    ]
