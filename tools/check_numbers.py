"""Check that each number with a unit in the documentation has a source.

A number with a unit (2.9 times, 12 GB, five minutes, 90 %) in docs/*.md or a README stands in a
table that a tool writes from results, or in docs/numbers.toml. There it names where it comes from:

- `result`, a file, and `value`, the place in it; compared with `low` and `high`;
- `file` and `contains`: the line of the code that sets the number;
- `source`, in words: what defines, counts or states it.

Code in the pages is left out.
"""

import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parent.parent
SOURCES = Path("docs") / "numbers.toml"
# Written as a whole, from results and other files that tests compare them with.
GENERATED = ("docs/benchmarks.md", "docs/compatibility.md", "docs/longnet-paper.md")
PAGES = ("README.md", "docs/*.md", "benchmarks/README.md", "packages/*/README.md")

_WORDS = "two|three|four|five|six|seven|eight|nine|ten|twelve|twenty|thirty|sixty|hundred"
_UNITS = (
    r"×(?!\s?\d)|%|[kKMGTP]i?B|bytes?|bits?(?: per byte)?"
    r"|[mµn]?s|min|h|seconds?|minutes?|hours?|times"
    r"|[GT]?FLOPs?(?:/s)?|tokens (?:per|a) second"
)
NUMBER = re.compile(
    rf"(?<![\w.,-])(?:\d(?:[\d,.]*\d)?\s?(?:{_UNITS})|(?:{_WORDS})\s(?:seconds|minutes|hours|times))(?!\w)"
)
_CODE = re.compile(
    r"^```.*?^```"  # a block
    r"|`[^`\n]*`"
    r"|^<!-- python -m tools\.\w+ writes [^\n]*-->.*?^<!-- end -->"
    r"|\]\([^)]*\)"  # an address
    r"|<!--.*?-->",
    re.MULTILINE | re.DOTALL,
)


def problems(root: Path) -> list[str]:
    """One line for each number without a source, and for each source that no longer holds."""
    path = root / SOURCES
    entries: list[dict[str, Any]] = tomllib.loads(path.read_text("utf-8")).get("number", [])
    found: list[str] = []
    for entry in entries:
        found += [f"{SOURCES}: {entry['text']!r}: {problem}" for problem in _check(root, entry)]
    for page in pages(root):
        name = page.relative_to(root).as_posix()
        text = page.read_text("utf-8")
        prose = _CODE.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)
        spans: list[tuple[int, int]] = []
        for entry in entries:
            if entry["page"] == name:
                there = [match.span() for match in _phrase(entry["text"]).finditer(prose)]
                if not there:
                    found.append(f"{SOURCES}: {name} no longer has {entry['text']!r}; remove it.")
                spans += there
        for match in NUMBER.finditer(prose):
            if not any(first <= match.start() and match.end() <= last for first, last in spans):
                line = prose.count("\n", 0, match.start()) + 1
                found.append(
                    f"{name}:{line}: {match.group()!r} has no source; take it from a generated "
                    f"table, or name its source in {SOURCES}."
                )
    known = {page.relative_to(root).as_posix() for page in pages(root)}
    for entry in entries:
        if entry["page"] not in known:
            found.append(f"{SOURCES}: there is no page {entry['page']!r} to check; remove it.")
    return found


def pages(root: Path) -> Iterator[Path]:
    """The pages that people write."""
    for pattern in PAGES:
        for page in sorted(root.glob(pattern)):
            if page.relative_to(root).as_posix() not in GENERATED:
                yield page


def _phrase(text: str) -> re.Pattern[str]:
    """The text, with a line break wherever it has a space."""
    return re.compile(r"\s+".join(map(re.escape, text.split())))


def _check(root: Path, entry: dict[str, Any]) -> Iterator[str]:
    """What is wrong with an entry itself, or with the result that it names."""
    kinds = {"result", "file", "source"} & entry.keys()
    if len(kinds) != 1:
        yield "it must have one of result, file and source."
        return
    if "file" in entry and entry["contains"] not in (root / entry["file"]).read_text("utf-8"):
        yield f"{entry['file']} no longer has {entry['contains']!r}; change the page."
    if "result" not in entry:
        return
    content: Any = json.loads((root / entry["result"]).read_text("utf-8"))
    values = list(_values(content, entry["value"].split(".")))
    if not values:
        yield f"{entry['result']} has nothing at {entry['value']}."
    for value in values:
        if not entry["low"] <= value <= entry["high"]:
            yield (
                f"{entry['result']} has {value} at {entry['value']}; it must be from "
                f"{entry['low']} to {entry['high']}. Change the page and the bounds."
            )


def _values(content: Any, path: list[str]) -> Iterator[float]:
    """What is at a path; `*` is every item of a list or of a table."""
    is_table = isinstance(content, dict)
    if not path:
        yield content
    elif path[0] == "*":
        items: list[Any] = [*cast("dict[str, Any]", content).values()] if is_table else content
        for item in items:
            yield from _values(item, path[1:])
    elif not is_table:
        yield from _values(content[int(path[0])], path[1:])
    elif path[0] in content:
        yield from _values(content[path[0]], path[1:])


def main() -> int:
    """Print the problems; 1 if there are any."""
    found = problems(ROOT)
    for problem in found:
        print(problem)
    if not found:
        print(f"{len(list(pages(ROOT)))} pages whose numbers with units have a source")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
