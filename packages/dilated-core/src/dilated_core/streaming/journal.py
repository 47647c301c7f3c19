"""A record on disk of how far a long call has come, so that it can go on after it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

from dilated_core.atomic_write import write_atomically

_FORMAT = 1


class Record(TypedDict):
    """What a journal holds.

    Attributes:
        format: Number of this layout.
        call: What the recorded call was made with; JSON values by name.
        done: Positions that are finished.
        sink_state: What the sink asked to keep with them, or None.
    """

    format: int
    call: dict[str, Any]
    done: int
    sink_state: Any


def read_journal(path: Path) -> Record | None:
    """The record at `path`; None if there is no file.

    Raises:
        ValueError: If the file is not such a record.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or record.keys() != Record.__annotations__.keys():
        raise ValueError(f"{path} is not a journal; give the path of one, or of no file yet.")
    if record["format"] != _FORMAT:
        raise ValueError(
            f"journal {path} has format {record['format']} and this version reads {_FORMAT}; "
            f"finish it with the version that began it, or delete it to start over."
        )
    return record  # pyright: ignore[reportReturnType, reportUnknownVariableType]


def check_same_call(path: Path, recorded: dict[str, Any], call: dict[str, Any]) -> None:
    """Check that a journal belongs to the call at hand.

    Raises:
        ValueError: If anything differs; the message lists all of it.
    """
    differences = [
        f"{name} was {recorded.get(name)!r} and is {call.get(name)!r}"
        for name in sorted(recorded.keys() | call.keys())
        if recorded.get(name) != call.get(name)
    ]
    if differences:
        raise ValueError(
            f"journal {path} belongs to another call: {', '.join(differences)}; repeat that call, "
            f"or delete the journal to start over."
        )


def write_journal(path: Path, call: dict[str, Any], done: int, sink_state: Any) -> None:
    """Replace the record at `path`, such that a kill leaves the old or the new one, never half.

    Raises:
        TypeError: If the state cannot be written as JSON.
    """
    record = Record(format=_FORMAT, call=call, done=done, sink_state=sink_state)
    try:
        text = json.dumps(record)
    except TypeError as error:
        raise TypeError(
            f"state_dict() of the sink returned {type(sink_state).__name__} that JSON cannot hold "
            f"({error}); return numbers, strings, lists and dicts of them."
        ) from error
    with write_atomically(path) as part:
        part.write_text(text, encoding="utf-8")
