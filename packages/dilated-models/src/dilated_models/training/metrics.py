"""`metrics.jsonl`: one JSON object per line, in order of time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from dilated_core.atomic_write import write_atomically

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """Appends records to the metrics of a run.

    Args:
        folder: Of the run.
        after_step: Records of later steps are dropped first. They were written after the checkpoint
            from which a resumed run starts, and the run writes them again.

    Attributes:
        validated: Steps whose validation loss is recorded.
    """

    def __init__(self, folder: Path, *, after_step: int) -> None:
        path = folder / METRICS_FILE
        self.validated: set[int] = set()
        if path.exists():
            kept = [
                record
                for record in read_metrics(folder)
                if record["step"] <= after_step and record["kind"] != "final"
            ]
            self.validated = {r["step"] for r in kept if r["kind"] == "validation"}
            with write_atomically(path) as part:
                part.write_text("".join(json.dumps(record) + "\n" for record in kept), "utf-8")
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, kind: str, step: int, **values: Any) -> None:
        """Append one record, and flush it to the file."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        if kind == "validation":
            self.validated.add(step)

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        os.fsync(self._file.fileno())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line that a crash cut short is skipped."""
    records: list[dict[str, Any]] = []
    with (folder / METRICS_FILE).open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                records.append(json.loads(line))
    return records
