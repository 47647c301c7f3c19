"""A record on disk of the finished part of a long call, which continues from it after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict, cast

from dilated_core.atomic_write import write_atomically
from dilated_core.checks import check_integer

_FORMAT = 1


class Record(TypedDict):
    """What a journal holds.

    Attributes:
        format: Number of this layout.
        call: What the recorded call was made with; JSON values by name.
        done: Positions that are finished.
        sink_state: The state of the sink after these positions; None for a sink without state.
    """

    format: int
    call: dict[str, Any]
    done: int
    sink_state: Any


def read_journal(path: Path) -> Record | None:
    """The record at `path`; None if there is no file.

    Raises:
        ValueError: If the file cannot be read or is not such a record, or its folder is missing.
    """
    if not path.parent.is_dir():
        raise ValueError(
            f"journal {path} lies in no folder; create {path.parent} or give another path."
        )
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:  # a folder, or a file of another user
        raise ValueError(
            f"journal {path} cannot be read ({error.strerror}); give the path of a readable file, "
            f"or of no file yet."
        ) from error
    except (ValueError, RecursionError):  # not UTF-8, not JSON, or nested without an end
        record = None
    if not isinstance(record, dict) or record.keys() != Record.__annotations__.keys():
        raise ValueError(f"{path} is not a journal; give the path of one, or of no file yet.")
    record = cast("Record", record)
    if type(record["format"]) is not int or record["format"] != _FORMAT:
        raise ValueError(
            f"journal {path} has format {record['format']!r} and this version reads {_FORMAT}; "
            f"finish it with the version that began it, or delete it to start over."
        )
    try:
        _check_record(record)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"journal {path} is damaged: {str(error).rstrip('.')}; delete it to start over."
        ) from error
    return record


def _check_record(record: Record) -> None:
    """Check the numbers that a call reads from a record; `check_same_call` compares the others."""
    call: Any = record["call"]
    if not isinstance(call, dict):
        raise TypeError(f"call is {call!r}; it must be an object")
    recorded = cast("dict[str, Any]", call)
    seq_len = check_integer("seq_len", recorded.get("seq_len"), at_least=1)
    check_integer("chunk_length", recorded.get("chunk_length"), at_least=1)
    check_integer("done", record["done"], at_least=0, at_most=seq_len)


def check_same_call(path: Path, recorded: dict[str, Any], call: dict[str, Any]) -> None:
    """Check that a journal belongs to the call at hand.

    Raises:
        ValueError: If anything differs; the message lists all of it.
    """
    # As JSON, so that true is not 1 and 2.0 is not 2.
    differences = [
        f"{name} was {recorded.get(name)!r} and is {call.get(name)!r}"
        for name in sorted(recorded.keys() | call.keys())
        if json.dumps(recorded.get(name)) != json.dumps(call.get(name))
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
        _check_names(sink_state)
        text = json.dumps(record)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"state_dict() of the sink returned {type(sink_state).__name__} that JSON cannot hold "
            f"({error}); return numbers, strings, lists and dicts of them."
        ) from error
    with write_atomically(path) as part:
        part.write_text(text, encoding="utf-8")


def _check_names(state: Any) -> None:
    """Refuse a dict whose keys are no strings: JSON would give them back as strings.

    Raises:
        TypeError: If there is one.
    """
    if isinstance(state, dict):
        for name, value in cast("dict[object, Any]", state).items():
            if not isinstance(name, str):
                raise TypeError(f"the key {name!r} of a dict is no string")
            _check_names(value)
    elif isinstance(state, (list, tuple)):
        for value in cast("list[Any]", state):
            _check_names(value)
