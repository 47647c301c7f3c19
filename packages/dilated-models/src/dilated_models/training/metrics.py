"""`metrics.jsonl`: one JSON object per line, in order of time."""

from __future__ import annotations

import json
import os
from collections.abc import Set
from pathlib import Path
from types import TracebackType
from typing import Any

from dilated_core.atomic_write import write_atomically

from dilated_models.training.ranks import Ranks
from dilated_models.training.tensorboard import TensorBoard

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends records to the metrics of a run.

    Args:
        folder: Of the run.
        after_step: Records of later steps are dropped first. They were written after the checkpoint
            from which a resumed run starts, and the run writes them again. A measure against a
            lack of memory stays, for it holds in the resumed run too.
        has_tensorboard: Whether to write them for TensorBoard too.

    Attributes:
        validated: Steps whose validation loss is recorded.
        sampled: Steps whose sample is recorded.
    """

    def __init__(self, folder: Path, *, after_step: int, has_tensorboard: bool = False) -> None:
        path = folder / METRICS_FILE
        self.validated: set[int] = set()
        self.sampled: set[int] = set()
        board = TensorBoard(folder, after_step=after_step) if has_tensorboard else None
        self._tensorboard = board
        if path.exists():
            kept = [
                record
                for record in read_metrics(folder)
                if (record["step"] <= after_step and record["kind"] != "final")
                or record["kind"] == "out_of_memory"
            ]
            self.validated = {r["step"] for r in kept if r["kind"] == "validation"}
            self.sampled = {r["step"] for r in kept if r["kind"] == "sample"}
            with write_atomically(path) as part:
                part.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
        self._path = path
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record; if the disk is full, none of it.

        Raises:
            OSError: If it cannot be written.
        """
        line = (json.dumps({"kind": kind, "step": step, **values}) + "\n").encode()
        whole = self._file.seek(0, os.SEEK_END)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:]) or 0
        except OSError as error:
            self._file.truncate(whole)
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        if kind == "validation":
            self.validated.add(step)
        if kind == "sample":
            self.sampled.add(step)
        if self._tensorboard is not None:
            self._tensorboard.write(kind, step, values)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file.fileno())


class UnwrittenMetrics:
    """The metrics of a run on a rank that does not write them.

    Args:
        validated, sampled: As of the `MetricsFile` of rank 0.
    """

    def __init__(self, validated: Set[int], sampled: Set[int]) -> None:
        self.validated = set(validated)
        self.sampled = set(sampled)

    def __enter__(self) -> UnwrittenMetrics:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Count a validation or a sample."""
        if kind == "validation":
            self.validated.add(step)
        if kind == "sample":
            self.sampled.add(step)

    def sync(self) -> None:
        """Do nothing."""


def open_metrics(
    folder: Path, *, after_step: int, ranks: Ranks, has_tensorboard: bool = False
) -> MetricsFile | UnwrittenMetrics:
    """The metrics of a run, which rank 0 writes; all ranks know which steps were validated."""
    file: MetricsFile | None = None

    def open_file() -> tuple[set[int], set[int]]:
        nonlocal file
        file = MetricsFile(folder, after_step=after_step, has_tensorboard=has_tensorboard)
        return file.validated, file.sampled

    known = ranks.first(open_file)
    return UnwrittenMetrics(*known) if file is None else file


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line that a crash cut short is skipped.

    Raises:
        ValueError: If another line is no record.
    """
    path = folder / METRICS_FILE
    records: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            try:
                records.append(_record(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(
                    f"line {number} of {str(path)!r} is no record of a run: {error}; remove the "
                    f"line (it serves the loss curve only), and try again."
                ) from error
    return records


def _record(line: bytes) -> dict[str, Any]:
    record: Any = json.loads(line)
    float(record["step"])
    if record["kind"] in ("step", "validation"):
        float(record["bits_per_byte"])
    return record
