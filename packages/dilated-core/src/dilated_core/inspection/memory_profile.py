"""How much memory a piece of code takes, from PyTorch's own record of its allocations."""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from dilated_core.atomic_write import write_atomically

# c10::DeviceType, which the profiler records by number.
_DEVICE_TYPES = {0: "cpu", 1: "cuda", 12: "xpu"}


class MemoryEvent(NamedTuple):
    """An allocation or a release, and how much memory is held after it.

    Attributes:
        seconds: Time since the first event.
        bytes: Memory on this device that was allocated within the profile and is still held.
        device: Such as "cpu" or "cuda:0".
    """

    seconds: float
    bytes: int
    device: str


@dataclass(slots=True)
class MemoryProfile:
    """What `memory_profile` measured; filled when its `with` block ends, by an exception too.

    All numbers count memory that PyTorch's allocators gave out within the block. The release of
    older memory does not count.

    Attributes:
        peak_bytes: The most memory that was held at once, on all devices together.
        allocated_bytes: Sum of all allocations, released or not.
        num_allocations: Number of allocations.
        held_bytes: Memory that was still held at the end.
        timeline: Every allocation and release in order.
    """

    peak_bytes: int = 0
    allocated_bytes: int = 0
    num_allocations: int = 0
    held_bytes: int = 0
    timeline: list[MemoryEvent] = field(default_factory=list[MemoryEvent])

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write all of it as JSON; the timeline as [seconds, bytes, device] lists."""
        numbers = {name: getattr(self, name) for name in MemoryProfile.__slots__}
        with write_atomically(path) as part:
            part.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Draw the timeline as one HTML file that loads nothing else.

        Raises:
            ImportError: If plotly is not installed.
        """
        try:
            go: Any = importlib.import_module("plotly.graph_objects")
        except ImportError as error:
            raise ImportError(
                "to_html draws with plotly, which is not installed; install it with: "
                "pip install dilated-core[profile]"
            ) from error
        figure = go.Figure()
        for device in sorted({event.device for event in self.timeline}):
            events = [event for event in self.timeline if event.device == device]
            figure.add_scatter(
                x=[event.seconds for event in events],
                y=[event.bytes / 2**20 for event in events],
                name=device,
                line_shape="hv",
                fill="tozeroy",
            )
        figure.update_layout(
            title=f"Memory: peak {self.peak_bytes / 2**20:.2f} MiB, "
            f"{self.num_allocations} allocations",
            xaxis_title="seconds",
            yaxis_title="MiB",
            showlegend=True,
        )
        with write_atomically(path) as part:
            figure.write_html(os.fspath(part), include_plotlyjs=True)


@contextmanager
def memory_profile() -> Generator[MemoryProfile, None, None]:
    """Measure what the `with` block allocates, on the CPU and on the GPU if there is one.

    Every allocation of a tensor counts, temporary ones within operators too. Other memory, such as
    Python objects, files and a kernel's stack, does not. PyTorch's profiler records this thread and
    the threads of autograd that work for it. The profiler slows the code down and records every
    operator, so measure short pieces. Profiles do not nest.

    Yields:
        The profile, empty until the block ends. An exception is passed on, and the profile then
        holds all events up to it.

    Raises:
        RuntimeError: If a profiler is already running.

    Example:
        >>> with memory_profile() as profile:
        ...     x = torch.empty(1024)
        ...     y = x + x
        ...     del x
        >>> profile.peak_bytes, profile.num_allocations, profile.held_bytes
        (8192, 2, 4096)
    """
    # A second profiler would cancel the first, and its record would be lost.
    if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage, reportPrivateUsage]
        raise RuntimeError(
            "a profiler is already running in this thread, and PyTorch can run only one; end it "
            "before memory_profile begins."
        )
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    result = MemoryProfile()
    # One cycle, so acc_events changes nothing; without it PyTorch 2.11 warns.
    profiler = profile(activities=activities, profile_memory=True, acc_events=True)
    profiler.start()
    try:
        yield result
    finally:
        profiler.stop()
        _fill(result, _recorded(profiler))


def _recorded(profiler: profile) -> list[dict[str, Any]]:
    """The profiler's memory events in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        # The public form of the record, which PyTorch can only write to a file.
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    return sorted(events, key=lambda event: (event["ts"], event["args"]["Ev Idx"]))


def _fill(result: MemoryProfile, events: list[dict[str, Any]]) -> None:
    # The profiler's own totals continue from earlier profiles, so totals are summed here.
    live: dict[tuple[str, int], int] = {}
    held: dict[str, int] = {}
    for event in events:
        recorded = event["args"]
        device_type = recorded["Device Type"]
        device = _DEVICE_TYPES.get(device_type, f"device type {device_type}")
        if recorded["Device Id"] >= 0:
            device += f":{recorded['Device Id']}"
        key, size = (device, recorded["Addr"]), recorded["Bytes"]
        if size > 0:
            live[key] = size
            result.num_allocations += 1
            result.allocated_bytes += size
        elif live.pop(key, None) is None:
            continue  # allocated before the profile began
        held[device] = held.get(device, 0) + size
        result.held_bytes += size
        result.peak_bytes = max(result.peak_bytes, result.held_bytes)
        seconds = (event["ts"] - events[0]["ts"]) / 1e6
        result.timeline.append(MemoryEvent(seconds, held[device], device))
