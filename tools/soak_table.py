"""The table of the soak run: faults that hit training, and what became of its bits."""

import json
import statistics
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]

SOAK = """\
## Training while faults hit it

`python benchmarks/soak.py`: {rounds} runs of {num_steps} steps by {processes} processes under
torchrun, one after another for {minutes:.0f} minutes, with {faults} faults at random steps. *kill*
is SIGKILL to a rank. *hang* is SIGSTOP; another rank must name the one that hangs. With *disk full*
rank 0 can write no file any longer. *stop* is SIGTERM to torchrun; the run is continued with
`--resume`. After the three others torchrun starts the processes again, and the run continues by
itself. {same} of {rounds} runs ended with the weights and losses of a run that nothing disturbed,
bit for bit; {named} of {hangs} hanging ranks were named.

| | runs | kill | hang | disk full | stop | same bits |
| --- | --- | --- | --- | --- | --- | --- |"""

FAULTS = ("kill", "hang", "disk full", "stop")


def soak_sections(results: Path) -> list[tuple[str, list[str]]]:
    """Name and lines of the section, if the run was recorded."""
    path = results / "soak.json"
    return [("soak", soak(json.loads(path.read_text())["rows"]))] if path.exists() else []


def soak(rows: Rows) -> list[str]:
    """Runs, faults and bits of each way to spread training."""
    events = [event for row in rows for event in row["events"]]
    hangs = [event for event in events if event["fault"] == "hang"]
    lines = [
        SOAK.format(
            rounds=len(rows),
            num_steps=rows[0]["num_steps"],
            processes=rows[0]["processes"],
            minutes=sum(row["seconds"] for row in rows) / 60,
            faults=len(events),
            same=sum(map(_is_same, rows)),
            named=sum(event["named"] for event in hangs),
            hangs=len(hangs),
        )
    ]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        own = [row for row in rows if row["kind"] == kind]
        found = [event["fault"] for row in own for event in row["events"]]
        counts = " | ".join(str(found.count(fault)) for fault in FAULTS)
        lines.append(f"| {kind} | {len(own)} | {counts} | {sum(map(_is_same, own))} |")
    waits = {
        fault: [event["seconds_to_end"] for event in events if event["fault"] == fault]
        for fault in FAULTS
    }
    lines += ["", "Median time from a fault until the processes it hit had ended: "]
    lines[-1] += ", ".join(
        f"{fault} {statistics.median(times):.0f} s" for fault, times in waits.items() if times
    )
    lines[-1] += "; a rank waits 20 s for another one here."
    return lines


def _is_same(row: dict[str, Any]) -> bool:
    return row["same_weights"] and row["same_losses"]
