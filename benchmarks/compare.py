"""Compare the results of two commits: `python benchmarks/compare.py A B`.

A and B are each a commit, whose benchmarks/results/ count, or a folder of such files. Every number
that measures something is compared with the one of the same row. *Worse* is how many times worse B
is: above 1, B is slower, needs more memory, or has a larger loss or lower accuracy. In brackets is
the spread of that ratio: from seeds or repeated rows, otherwise from quartiles, otherwise `--noise`
on both sides. A change whose spread holds 1 is within the noise. `--fail-above 1.1` exits with 1 if
a change outside the noise is worse than that.

Results of two days also differ by what else the machine did. `--timed BASE` therefore times
`dilated_attention` of a commit, or of its checkout BASE, and of this tree now and in turn, with a
second process of BASE as control.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"

# A number's direction follows from its name, or a float's from that of what holds it.
LOWER_IS_BETTER = re.compile(r"(^|_)(s|seconds|bytes|bytes_of_a_rank|bits_per_byte|loss)$")
HIGHER_IS_BETTER = re.compile(
    r"(^|_)(tokens_per_second|speed_up|efficiency|accuracy|mass|recall|of_oracle|right)$"
    r"|^ratio_to_|^ratio$"
)
# Neither measured nor part of what was measured; or the spread, or the source, of another number.
LEFT_OUT = re.compile(
    r"^(seed|rounds|load|note|run|checksum|model|training|environment|gflops|validation|cpu_s"
    r"|base_commit|steps_per_second|(final|num)_bytes|.*fastest_ratio|control_.*|.*quartiles"
    r"|.*_by_tenth|low_\w*|high_\w*|.*_reason)$"
)
QUARTILES_OF = {"call_s": ("low_s", "high_s")}  # beside median_X they are low_X and high_X
CONFIGURED_FLOATS = ("sparsity_ratio", "dropout_p", "share")


class Value(NamedTuple):
    """A measured number and its spread."""

    middle: float
    low: float
    high: float


class Change(NamedTuple):
    """How a number of B compares with that of A.

    Attributes:
        benchmark: Name of the result file.
        row: What was measured.
        name: Of the number.
        before: In A.
        after: In B.
        worse: How many times worse B is.
        low: Least value of `worse` within the spread.
        high: Largest one.
    """

    benchmark: str
    row: str
    name: str
    before: float
    after: float
    worse: float
    low: float
    high: float

    @property
    def is_outside_noise(self) -> bool:
        """Whether the spread leaves out 1."""
        return self.low > 1 or self.high < 1


def read_results(source: str) -> dict[str, list[dict[str, Any]]]:
    """Rows of every result file of a folder or of a commit, by name.

    Raises:
        ValueError: If it is neither, or has no results.
    """
    folder = Path(source)
    if folder.is_dir():
        texts = {path.stem: path.read_text() for path in sorted(folder.glob("*.json"))}
    else:
        listed = _git("ls-tree", "--name-only", f"{source}:{RESULTS}")
        if listed is None:
            raise ValueError(
                f"{source!r} is neither a folder nor a commit with {RESULTS}/; name one of these."
            )
        names = [name for name in listed.split() if name.endswith(".json")]
        texts = {
            name.removesuffix(".json"): _git("show", f"{source}:{RESULTS}/{name}") or ""
            for name in names
        }
    results = {name: json.loads(text).get("rows", []) for name, text in texts.items()}
    if not results:
        raise ValueError(f"{source!r} has no result files; name a folder of *.json.")
    return results


def _git(*arguments: str) -> str | None:
    run = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


def direction(path: tuple[str, ...]) -> int:
    """1 if more is worse, -1 if less is worse, 0 if the number measures nothing."""
    for name in reversed(path):
        if LEFT_OUT.search(name):
            return 0
        if LOWER_IS_BETTER.search(name):
            return 1
        if HIGHER_IS_BETTER.search(name):
            return -1
    return 0


def is_measured(content: Any, path: tuple[str, ...]) -> bool:
    """Whether a number measures something; a whole number does by its own name only."""
    if isinstance(content, float):
        return direction(path) != 0
    is_whole = isinstance(content, int) and not isinstance(content, bool)
    return is_whole and direction(path[-1:]) != 0


def measured(row: dict[str, Any], noise: float) -> dict[tuple[str, str], Value]:
    """Every measured number of a row, by what was measured and the number's name."""
    return {
        (", ".join(identity), ".".join(path)): value
        for identity, path, value in _walk(row, (), noise)
    }


def _walk(
    part: dict[str, Any], path: tuple[str, ...], noise: float
) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], Value]]:
    """Identity, path and value of the numbers of a part of a row and of the parts within it."""
    own = _identity(part, path)
    for name, content in part.items():
        here = (*path, name)
        if LEFT_OUT.search(name):
            continue
        if isinstance(content, dict):
            inner = ((i, p, v) for i, p, v in _walk(content, here, noise))
        elif isinstance(content, list) and content and isinstance(content[0], dict):
            inner = (found for item in content for found in _walk(item, here, noise))
        elif is_measured(content, here):
            yield own, here, _value(part, name, float(content), noise)
            continue
        else:
            continue
        for identity, inner_path, value in inner:
            yield (*own, *identity), inner_path, value


def _identity(part: dict[str, Any], path: tuple[str, ...]) -> tuple[str, ...]:
    """What a part of a row is about: its texts and the numbers that measure nothing."""
    return tuple(
        f"{name}={content}"
        for name, content in part.items()
        if not LEFT_OUT.search(name)
        and not is_measured(content, (*path, name))
        and (
            isinstance(content, str | int)
            or name in CONFIGURED_FLOATS
            or (isinstance(content, list) and not any(isinstance(x, dict) for x in content))
        )
    )


def _value(part: dict[str, Any], name: str, middle: float, noise: float) -> Value:
    """A number with its quartiles where its row has them."""
    middle = max(middle, 0.0)  # memory may be below that at the start
    stem = name.removeprefix("median_")
    bounds = QUARTILES_OF.get(name, (f"low_{stem}", f"high_{stem}"))
    if f"{name}_quartiles" in part:
        low, high = part[f"{name}_quartiles"]
    elif bounds[0] in part and bounds[1] in part:
        low, high = part[bounds[0]], part[bounds[1]]
    else:
        return Value(middle, middle * (1 - noise), middle * (1 + noise))
    return Value(middle, min(low, middle), max(high, middle))


def by_identity(rows: list[dict[str, Any]], noise: float) -> dict[tuple[str, str], Value]:
    """The numbers of all rows; those of rows that differ in the seed only become one."""
    groups: dict[tuple[str, str], list[Value]] = {}
    for row in rows:
        for key, value in measured(row, noise).items():
            groups.setdefault(key, []).append(value)
    return {
        key: values[0]
        if len(values) == 1
        else Value(
            statistics.median(value.middle for value in values),
            min(value.middle for value in values),
            max(value.middle for value in values),
        )
        for key, values in groups.items()
    }


def changes(
    before: dict[str, list[dict[str, Any]]],
    after: dict[str, list[dict[str, Any]]],
    *,
    noise: float,
) -> tuple[list[Change], list[str]]:
    """How B's numbers compare with A's, worst first, and what only one of them has."""
    found: list[Change] = []
    alone: list[str] = []
    for benchmark in sorted(before.keys() | after.keys()):
        ours, theirs = (by_identity(side.get(benchmark, []), noise) for side in (after, before))
        for key in theirs.keys() & ours.keys():
            found.append(_change(benchmark, key, theirs[key], ours[key]))
        for side, only in (("A", theirs.keys() - ours.keys()), ("B", ours.keys() - theirs.keys())):
            if only:
                alone.append(f"{benchmark}: {len(only)} numbers only in {side}")
    return sorted(found, key=lambda change: -change.worse), alone


def _change(benchmark: str, key: tuple[str, str], a: Value, b: Value) -> Change:
    if direction(tuple(key[1].split("."))) > 0:
        ratios = (_ratio(b.middle, a.middle), _ratio(b.low, a.high), _ratio(b.high, a.low))
    else:
        ratios = (_ratio(a.middle, b.middle), _ratio(a.low, b.high), _ratio(a.high, b.low))
    return Change(benchmark, *key, a.middle, b.middle, *ratios)


def _ratio(over: float, under: float) -> float:
    """1 for 0 / 0: both sides have none of it."""
    if over == under:
        return 1.0
    return over / under if under else math.inf


def report(found: list[Change], alone: list[str], *, show_all: bool) -> str:
    """The table, and how many changes there are."""
    outside = [change for change in found if change.is_outside_noise]
    lines = [
        f"{change.worse:6.3f} ({change.low:.3f} to {change.high:.3f})"
        f"{' ' if change.is_outside_noise else ' (within the noise) '}"
        f"{change.benchmark}: {change.name} {change.before:.6g} -> {change.after:.6g}; {change.row}"
        for change in (found if show_all else outside)
    ]
    worse = sum(change.worse > 1 for change in outside)
    return "\n".join(
        [
            "how many times worse (spread), number of A -> of B; what was measured",
            *lines,
            *alone,
            f"{len(found)} numbers in both; outside the noise: {worse} worse, "
            f"{len(outside) - worse} better",
        ]
    )


@contextlib.contextmanager
def checkout_of(base: str) -> Iterator[Path]:
    """A folder that is a checkout, or a temporary checkout of a commit."""
    if Path(base).is_dir():
        yield Path(base)
        return
    with tempfile.TemporaryDirectory() as outside:
        folder = Path(outside) / "base"
        if _git("worktree", "add", "--detach", str(folder), base) is None:
            raise ValueError(f"{base!r} is neither a folder nor a commit; name one of these.")
        try:
            yield folder
        finally:
            _git("worktree", "remove", "--force", str(folder))


def timed_changes(rows: list[dict[str, Any]]) -> list[Change]:
    """The rows of `timed_in_turn`; the spread also covers how far the control is from 1."""
    found: list[Change] = []
    for row in rows:
        low, high = row["ratio_quartiles"]
        drift = abs(math.log(row["control_ratio"]))
        what = f"S={row['seq_len']}, {'causal' if row['is_causal'] else 'full'}, {row['dtype']}"
        spread = (math.exp(-drift) / high, math.exp(drift) / low)
        found.append(
            Change(
                *("dilated_attention", what, row["part"], row["base_s"], row["here_s"]),
                *(1 / row["ratio"], *spread),
            )
        )
    return sorted(found, key=lambda change: -change.worse)


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; 1 if a change is worse than `--fail-above`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="*", metavar="A B", help="commit or folder, twice")
    parser.add_argument("--fail-above", type=float, metavar="RATIO")
    parser.add_argument("--noise", type=float, default=0.1, help="where a row has no spread: ±0.1")
    parser.add_argument("--all", action="store_true", help="also what is within the noise")
    parser.add_argument("--only", nargs="*", default=[], help="benchmarks to compare")
    parser.add_argument("--timed", metavar="BASE", help="time a commit and this tree now, in turn")
    parser.add_argument("--rounds", type=int, default=15, help="of --timed")
    parser.add_argument("--cases", type=int, nargs="*", help="of --timed, by number")
    parser.add_argument("--out", type=Path, help="result file of --timed")
    options = parser.parse_args(arguments)
    if bool(options.timed) == bool(options.sides) or len(options.sides) not in (0, 2):
        parser.error("name two commits or folders, or --timed BASE")
    try:
        if options.timed:
            from timed_in_turn import time_cases

            with checkout_of(options.timed) as base:
                rows = time_cases(base, options.rounds, options.cases, options.out)
            found, alone = timed_changes(rows), []
        else:
            sides = [read_results(side) for side in options.sides]
            if options.only:
                sides = [{n: r for n, r in side.items() if n in options.only} for side in sides]
            found, alone = changes(sides[0], sides[1], noise=options.noise)
    except ValueError as error:
        parser.error(str(error))
    print(report(found, alone, show_all=options.all or bool(options.timed)))
    limit = options.fail_above
    return int(
        limit is not None and any(c.is_outside_noise and c.worse > max(1, limit) for c in found)
    )


if __name__ == "__main__":
    sys.exit(main())
