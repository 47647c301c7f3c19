"""Write docs/compatibility.md from its data: `python -m tools.compatibility_table`."""

import argparse
import importlib
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
DATA, PAGE = ROOT / "docs" / "compatibility.toml", ROOT / "docs" / "compatibility.md"
PACKAGES = ("dilated-core", "dilated-kernels", "dilated-ring", "dilated-sparse", "dilated-models")

# Every feature of the earlier library: so many per subject, numbered from 1; a letter where a
# number has several.
SUBJECTS = {
    "CORE": ("Attention", "1 2 3 4 5"),
    "MH": ("Multi-head modules", "1 2 3 4 5"),
    "MOD": ("Models", "1 2 3"),
    "RING": (
        "Ring attention",
        "1 2 3 4 5 6 7 8 9 10 11a 11b 11c 11d 12 13a 13b 13c 13d 13e 14a 14b 14c 14d 15 16",
    ),
    "DIST": ("Distributed training", "1 2 3 4 5 6"),
    "SP": ("Block-sparse attention", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
    "FAC": ("Factories", "1 2 3 4 5a 5b 5c 5d 5e 6 7 8 9 10"),
    "CFG": ("Configuration", "1 2 3 4 5 6"),
    "INF": ("Infrastructure", "1 2 3a 3b 3c 3d 3e 4 5 6 7 8 9"),
    "UT": ("Utilities", "1 2 3 4 5 6 7"),
    "HIL": ("Hilbert orders", "1"),
    "OPT": ("Optimisations", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"),
    "BEN": ("Benchmarks", "1 2 3 4 5 6a 6b 6c 6d 7 8a 8b 9a 9b 10"),
    "SCR": ("Scripts", "1a 1b 1c 2a 2b 2c 3 4a 4b 5"),
    "ANA": ("Analysis", "1 2a 2b 3a 3b 3c 3d 3e"),
    "EX": ("Examples", "1 2 3 4 5 6 7"),
    "DOC": ("Documentation", "1a 1b 1c 1d 1e 1f 2 3"),
    "TST": ("Tests", "1a 1b 1c 1d 1e 1f 1g 1h 2 3"),
    "TOOL": ("Tools", "1 2 3 4"),
}

INTRODUCTION = """\
# Coming from dilated-attention-pytorch

This page lists every feature that the documents of the earlier library name, with what replaces it.

- *works*: the feature exists, under the name or as the option that the row states.
- *alias of*: another name does the same.
- *comes with*: a planned package will have it.

`python -m tools.compatibility_table` writes this page from `docs/compatibility.toml`. A test
imports every target and runs the documented calls.

Three things differ everywhere. Attention is the paper's: every head runs through every branch, and
one softmax mixes them. Every sequence length works. Modules return a tensor, and a pair only where
`need_weights` is passed. [Migrating](migrating.md#successors-of-dilated-attention-pytorch) shows
which results stay the same.

"""


class Group(NamedTuple):
    """Features that are not carried over, and why."""

    reason: str
    features: list[dict[str, str]]


class Row(NamedTuple):
    """One feature; the data file says what the fields mean."""

    id: str
    name: str
    status: str
    target: str = ""
    note: str = ""
    check: str = ""


def read(path: Path) -> list[Row]:
    """The rows of the data file, checked for what can be checked without importing anything.

    Raises:
        ValueError: If rows are missing, unknown, repeated, or incomplete.
    """
    data = _load(path)
    rows = [Row(**row) for row in data["rows"]]
    dropped = [feature["id"] for group in read_dropped(path) for feature in group.features]
    counted, expected = Counter([*(row.id for row in rows), *dropped]), set(expected_ids())
    if repeated := [name for name, times in counted.items() if times > 1]:
        raise ValueError(f"{path.name} has {', '.join(repeated)} more than once.")
    if wrong := sorted(expected ^ counted.keys()):
        raise ValueError(f"{path.name} lacks, or should not have, {', '.join(wrong)}.")
    for row in rows:
        complete = {
            "works": bool(row.target),
            "alias": bool(row.target),
            "later": row.target in PACKAGES,
        }
        if not complete.get(row.status, False):
            raise ValueError(f"{row.id} in {path.name} has no valid status, target and note.")
    return rows


def read_dropped(path: Path) -> list[Group]:
    """The groups of features that are not carried over."""
    return [Group(**group) for group in _load(path)["not_carried_over"]]


def _load(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def expected_ids() -> list[str]:
    """The ids of all features, such as CORE-01 and RING-11a."""
    ids: list[str] = []
    for subject, (_, numbers) in SUBJECTS.items():
        for number in numbers.split():
            letter = number[-1] if number[-1].isalpha() else ""
            ids.append(f"{subject}-{int(number.removesuffix(letter)):02d}{letter}")
    return ids


def find(target: str) -> object:
    """The file or the object that a target names.

    Raises:
        LookupError: If there is none.
    """
    if (ROOT / target).is_file():
        return ROOT / target
    parts = target.split(".")
    for count in range(len(parts) - 1, 0, -1):  # the longest prefix that is a module
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        try:
            for name in parts[count:]:
                found = getattr(found, name)
        except AttributeError:
            break
        return found
    raise LookupError(f"{target} is neither a file of this repository nor importable.")


def page(path: Path) -> str:
    """The whole page."""
    rows = {row.id: row for row in read(path)}
    lines: list[str] = []
    for subject, (title, _) in SUBJECTS.items():
        lines += [f"## {title}", "", "| id | feature | here |", "| --- | --- | --- |"]
        for name in expected_ids():
            if name.startswith(f"{subject}-") and name in rows:
                row = rows[name]
                lines.append(f"| {row.id} | {row.name} | {_outcome(row)} |")
        lines.append("")
    lines += ["## Not carried over", "", _reasons(read_dropped(path)), ""]
    return INTRODUCTION + "\n".join(lines)


def _reasons(groups: list[Group]) -> str:
    """A list of the features that are not carried over, by reason."""
    sentences: list[str] = []
    for group in groups:
        features = ", ".join(f"{feature['name']} ({feature['id']})" for feature in group.features)
        sentences.append(f"- Because {group.reason}: {features}.")
    return "\n".join(sentences)


def _outcome(row: Row) -> str:
    words = {"works": "works:", "alias": "alias of", "later": "comes with"}[row.status]
    return f"{words} `{row.target}`. {row.note}".strip()


def main(arguments: list[str] | None = None) -> int:
    """Write the page, or with `--check` compare it with the one on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is out of date")
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    text = page(options.data)
    if not options.check:
        options.page.write_text(text, encoding="utf-8")
    elif not options.page.exists() or options.page.read_text(encoding="utf-8") != text:
        print(f"{options.page} is out of date; write it with: python -m tools.compatibility_table")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
