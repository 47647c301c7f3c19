"""The result of measuring backends, and the file that keeps it, read strictly."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from dilated_core import DilatedPattern
from dilated_core.atomic_write import write_atomically

FORMAT = 1
"""Raised when the fields of the file change meaning."""

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}

By = Literal["forward_backward", "forward"]


@dataclass(frozen=True, slots=True)
class Timing:
    """One backend in one case.

    Attributes:
        backend: Its name.
        forward_s: Seconds of a forward pass; None if the backend was refused.
        forward_backward_s: Seconds of a forward and a backward pass; likewise.
        refused: Why it must not be ranked, such as wrong results; None if it may be.
    """

    backend: str
    forward_s: float | None
    forward_backward_s: float | None
    refused: str | None


@dataclass(frozen=True, slots=True)
class Case:
    """One size, and the times of the backends.

    Attributes:
        dtype: Of q, k and v, such as "bfloat16".
        head_dim: D.
        seq_len: S.
        timings: One of each backend that can run the case.
    """

    dtype: str
    head_dim: int
    seq_len: int
    timings: tuple[Timing, ...]


@dataclass(frozen=True, slots=True)
class MeasuredChoice:
    """The result of `measure_backends`, and the machine that it was measured on.

    Attributes:
        device_type: Such as "cuda".
        device_name: Such as "NVIDIA H200".
        num_threads: Threads of PyTorch on the CPU.
        date: Day of the measurement, as 2026-11-21.
        versions: Of the packages that decide speed; None for one that is not installed.
        pattern: Of the attention.
        batch_size: B.
        num_heads: H.
        is_causal: Whether attention was causal.
        cases: One for each size that was measured.
    """

    device_type: str
    device_name: str
    num_threads: int
    date: str
    versions: dict[str, str | None]
    pattern: DilatedPattern
    batch_size: int
    num_heads: int
    is_causal: bool
    cases: tuple[Case, ...]

    def flops(self, case: Case, *, by: By) -> int:
        """Floating-point operations of one run of `case`, as attention papers count them."""

        def count(backward: bool) -> int:
            return self.pattern.flops(
                case.seq_len,
                self.num_heads,
                case.head_dim,
                batch_size=self.batch_size,
                is_causal=self.is_causal,
                backward=backward,
            )

        return count(False) + (count(True) if by == "forward_backward" else 0)

    def save(self, path: Path | str) -> None:
        """Write a JSON file that `use_measured_choice` reads."""
        text = json.dumps({"format": FORMAT, **asdict(self)}, indent=1)
        with write_atomically(path) as part:
            part.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path | str) -> MeasuredChoice:
        """Read a file that `save` wrote.

        Raises:
            OSError: If it cannot be read.
            ValueError: If any field of the file is missing, unknown or wrong.
        """
        try:
            return _parsed(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:  # of json, too
            raise ValueError(f"{str(path)!r} is no measured choice: {error}") from error


_Types = type | tuple[type, ...]

_FIELDS: dict[str, _Types] = {
    "format": int,
    "device_type": str,
    "device_name": str,
    "num_threads": int,
    "date": str,
    "versions": dict,
    "pattern": dict,
    "batch_size": int,
    "num_heads": int,
    "is_causal": bool,
    "cases": list,
}
_PATTERN_FIELDS: dict[str, _Types] = {
    "segment_lengths": list,
    "dilation_rates": list,
    "head_offsets": str,
    "padding": str,
}
_CASE_FIELDS: dict[str, _Types] = {
    "dtype": str,
    "head_dim": int,
    "seq_len": int,
    "timings": list,
}
_TIMING_FIELDS: dict[str, _Types] = {
    "backend": str,
    "forward_s": (float, int, type(None)),
    "forward_backward_s": (float, int, type(None)),
    "refused": (str, type(None)),
}


def _parsed(record: object) -> MeasuredChoice:
    """A MeasuredChoice from a JSON value that has every field, of its type, and no other."""
    read = _fields(record, "the file", {"format": int}, more=True)
    if read["format"] != FORMAT:
        raise ValueError(f"format is {read['format']}, and this package reads {FORMAT}.")
    read = _fields(record, "the file", _FIELDS)
    del read["format"]
    for name in ("num_threads", "batch_size", "num_heads"):
        _check(read[name] > 0, f"{name} is {read[name]}; it must be above 0.")
    for package, installed in read["versions"].items():
        _check(
            installed is None or isinstance(installed, str),
            f"the version of {package} is {installed!r}; it must be a string or null.",
        )
    read["pattern"] = DilatedPattern(**_fields(read["pattern"], "pattern", _PATTERN_FIELDS))
    read["cases"] = tuple(_parsed_case(case) for case in read["cases"])
    sizes = [(case.dtype, case.head_dim, case.seq_len) for case in read["cases"]]
    _check(bool(sizes), "cases is empty.")
    _check(len(set(sizes)) == len(sizes), "two cases are of the same size.")
    return MeasuredChoice(**read)


def _parsed_case(record: object) -> Case:
    read = _fields(record, "a case", _CASE_FIELDS)
    _check(
        read["dtype"] in DTYPES,
        f"dtype is {read['dtype']!r}; it must be one of {', '.join(DTYPES)}.",
    )
    for name in ("head_dim", "seq_len"):
        _check(read[name] > 0, f"{name} is {read[name]}; it must be above 0.")
    timings = tuple(_parsed_timing(timing) for timing in read["timings"])
    names = [timing.backend for timing in timings]
    _check(len(set(names)) == len(names), f"a backend is twice in a case: {', '.join(names)}.")
    return Case(read["dtype"], read["head_dim"], read["seq_len"], timings)


def _parsed_timing(record: object) -> Timing:
    read = _fields(record, "a timing", _TIMING_FIELDS)
    times = (read["forward_s"], read["forward_backward_s"])
    good = (
        all(t is None for t in times)
        if read["refused"] is not None
        else all(t is not None and math.isfinite(t) and t > 0 for t in times)
    )
    _check(
        good,
        f"the timing of {read['backend']!r} is {times} with refused {read['refused']!r}; it must "
        f"have two times above 0, or none and a reason.",
    )
    return Timing(**read)


def _fields(
    record: object, where: str, types: Mapping[str, _Types], *, more: bool = False
) -> dict[str, Any]:
    """`record` as a dict with exactly these fields, of these types; with others too if `more`."""
    _check(isinstance(record, dict), f"{where} is {record!r}; it must be an object.")
    read = cast(dict[str, Any], record)
    for name, allowed in types.items():
        _check(name in read, f"{where} has no {name}.")
        value = read[name]
        # In Python a bool is an int; here it is not.
        right = isinstance(value, allowed) and (allowed is bool or not isinstance(value, bool))
        _check(right, f"{name} is {value!r}, which is not of the right type.")
    unknown = ", ".join(sorted(set(read) - set(types)))
    _check(more or not unknown, f"{where} has unknown fields: {unknown}.")
    return dict(read)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
