"""Rank backends by what was measured on this machine.

Only a call of `use_measured_choice` applies a measurement, to the process that calls it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from dilated_core import AttentionInputs
from dilated_core.backends.registry import use_ranking

from dilated_kernels.ranking.file import DTYPES, By, Case, MeasuredChoice
from dilated_kernels.ranking.table import Rank

# A measurement holds for these packages; other versions may be faster or slower.
_PACKAGES = (
    "dilated-core",
    "dilated-kernels",
    "torch",
    "triton",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "xformers",
)
_FASTEST = 100  # above every rank of a table


def use_measured_choice(
    choice: MeasuredChoice | Path | str | None, *, by: By = "forward_backward"
) -> None:
    """Let `backend="auto"` follow a measurement from now on, in this process.

    For the device, dtypes and head_dims that were measured, backends rank by their time at the
    measured length that is nearest in ratio, or at the longest if the length is unknown. "auto"
    does not take backends that gave wrong results or failed. For other inputs, backends rank as
    before.

    Args:
        choice: From `measure_backends`, or the file it was saved in; None returns to the table.
        by: "forward_backward", or "forward" to rank by the time of forward alone, for inference.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If the file is not of this format, or was measured on a device that is not here,
            or with other versions of the packages.
    """
    if by not in ("forward_backward", "forward"):
        raise ValueError(f"by is {by!r}; it must be 'forward_backward' or 'forward'.")
    if choice is None:
        use_ranking(None)
        return
    if not isinstance(choice, MeasuredChoice):
        choice = MeasuredChoice.load(choice)
    _check_versions(choice)
    devices = _devices_named(choice)
    ranks = _ranks(choice, by)

    def ranking(inputs: AttentionInputs) -> dict[str, Rank]:
        lengths = ranks.get((inputs.dtype, inputs.head_dim))
        if lengths is None or not on_device(inputs.device):
            return {}
        return _nearest(lengths, inputs.seq_len)

    def on_device(device: torch.device) -> bool:
        if device.type != choice.device_type:
            return False
        index: int | None = device.index  # torch's annotation leaves out the None
        return (_current(device.type) if index is None else index) in devices  # pyright: ignore[reportUnnecessaryComparison]

    use_ranking(ranking)


def device_name(device: torch.device) -> str:
    """The name that the hardware reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def installed_versions() -> dict[str, str | None]:
    """Versions of the packages that decide how fast backends are; None if not installed."""
    return {package: _version(package) for package in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _check_versions(choice: MeasuredChoice) -> None:
    here = installed_versions()
    changed = [
        f"{package} was {choice.versions.get(package) or 'not installed'}, and is "
        f"{here.get(package) or 'not installed'}"
        for package in dict.fromkeys((*here, *choice.versions))
        if here.get(package) != choice.versions.get(package)
    ]
    if changed:
        raise ValueError(
            f"the choice was measured on {choice.date} with other packages: {'; '.join(changed)}. "
            f"Measure again, with dilated info --benchmark --save FILE."
        )


def _devices_named(choice: MeasuredChoice) -> frozenset[int]:
    """Indices of the devices with the name of the measured one."""
    kind = choice.device_type
    names = {i: device_name(torch.device(kind, i)) for i in range(_count(kind))}
    if found := frozenset(i for i, name in names.items() if name == choice.device_name):
        return found
    here = ", ".join(dict.fromkeys(names.values())) or "none"
    raise ValueError(
        f"the choice was measured on {choice.device_name!r}, and the {kind} devices here are: "
        f"{here}. Measure on this machine, with dilated info --benchmark --save FILE."
    )


def _count(kind: str) -> int:
    if kind == "cuda":
        return torch.cuda.device_count()
    if kind == "xpu":
        return torch.xpu.device_count()
    return int(kind == "cpu" or (kind == "mps" and torch.backends.mps.is_available()))


def _current(kind: str) -> int:
    """The index of the device that PyTorch uses where no index is given."""
    if kind == "cuda":
        return torch.cuda.current_device()
    return torch.xpu.current_device() if kind == "xpu" else 0


class _Length(NamedTuple):
    seq_len: int
    ranks: dict[str, Rank]


def _ranks(choice: MeasuredChoice, by: By) -> dict[tuple[torch.dtype, int], list[_Length]]:
    table: dict[tuple[torch.dtype, int], list[_Length]] = {}
    for case in choice.cases:
        lengths = table.setdefault((DTYPES[case.dtype], case.head_dim), [])
        lengths.append(_Length(case.seq_len, _case_ranks(choice, case, by)))
    return table


def _case_ranks(choice: MeasuredChoice, case: Case, by: By) -> dict[str, Rank]:
    source = f"measured on {choice.device_name}, {choice.date}, {case.seq_len} positions"
    what = "forward and backward" if by == "forward_backward" else "forward"
    ranks: dict[str, Rank] = {}
    times: list[tuple[float, str]] = []
    for timing in case.timings:
        seconds = timing.forward_backward_s if by == "forward_backward" else timing.forward_s
        if seconds is None:
            ranks[timing.backend] = Rank(-1, f"{source}: {timing.refused}")
        else:
            times.append((seconds, timing.backend))
    for place, (seconds, name) in enumerate(sorted(times)):
        ranks[name] = Rank(_FASTEST - place, f"{source}: {seconds * 1e3:.3g} ms {what}")
    return ranks


def _nearest(lengths: Sequence[_Length], seq_len: int | None) -> dict[str, Rank]:
    if seq_len is None:
        return max(lengths, key=lambda length: length.seq_len).ranks
    return min(lengths, key=lambda length: abs(math.log(length.seq_len / max(1, seq_len)))).ranks
