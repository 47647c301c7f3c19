"""Every version that this workspace installs is pinned, so that every machine gets the same ones.

The pins are `[tool.uv] constraint-dependencies` in pyproject.toml: uv then resolves to the same
versions on any day, whatever a registry has released since. requirements.lock has the hashes of
the same versions and no addresses; a security scan reads it.

Without an argument this module checks, from committed files and installed packages alone. With
`--write` it resolves the workspace, in an empty folder because an older uv.lock would keep versions
that nobody else gets, and writes both files.
"""

import argparse
import shutil
import subprocess
import tempfile
import tomllib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from tools.packages import ROOT
from tools.report import report

LOCK = "requirements.lock"
WRITE = "run `uv run nox -s lock`"
START = "# Pins: `nox -s lock` writes them.\n"
END = "# End of the pins.\n"
VENDORS_LINE = "  # Not in requirements.lock, which would then be built for one PyTorch only:\n"
VENDORS = {"flash", "xformers"}  # the extras with vendors' kernels
BUILD_GROUP = "build"  # the top pyproject's group with what the packages' build-system requires


@dataclass(frozen=True, slots=True)
class Pins:
    """Requirements `name==version`, with a marker where a package has several versions."""

    locked: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()
    """What only the extras in VENDORS bring."""
    build: tuple[str, ...] = ()
    """Those of `locked` that build the packages: uv builds in an environment of its own."""

    def without(self, names: Collection[str]) -> "Pins":
        """These pins, but none for `names`."""

        def kept(pins: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(pin for pin in pins if Requirement(pin).name not in names)

        return Pins(kept(self.locked), kept(self.vendors), kept(self.build))


def pins_of(exported: str) -> tuple[str, ...]:
    """The pins in a requirements file; raises InvalidRequirement for a line that is none.

    A marker is dropped where there is one version: it tells who needs the package, and a pin may
    hold for everybody.
    """
    found = [Requirement(line.partition(" --hash=")[0]) for line in _entries(exported)]
    versions = Counter(entry.name for entry in found)
    pins = (
        str(entry) if versions[entry.name] > 1 else f"{entry.name}{entry.specifier}"
        for entry in found
    )
    return tuple(sorted(pin.replace('"', "'") for pin in pins))  # TOML's strings have the other


def render_block(pins: Pins) -> str:
    """The lines of pyproject.toml that hold the pins."""
    vendors = VENDORS_LINE + _lines(pins.vendors) if pins.vendors else ""
    return (
        f"{START}constraint-dependencies = [\n{_lines(pins.locked)}{vendors}]\n"
        f"build-constraint-dependencies = [\n{_lines(pins.build)}]\n{END}"
    )


def replace_block(text: str, pins: Pins) -> str:
    """The text of pyproject.toml with other pins; ValueError when it has no place for them."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(
            f"pyproject.toml needs the lines {START.strip()!r} and {END.strip()!r} in [tool.uv]"
        )
    return before + render_block(pins) + after


def read_pins(text: str) -> Pins:
    """The pins in the text of pyproject.toml."""
    settings = tomllib.loads(text).get("tool", {}).get("uv", {})
    pinned: list[str] = settings.get("constraint-dependencies", [])
    # TOML has no place for the one comment that divides the list.
    block = text.partition(START)[2].partition(END)[0].partition("]\n")[0]
    vendor_lines = block.partition(VENDORS_LINE)[2].count("\n")
    locked = max(len(pinned) - vendor_lines, 0)
    build: list[str] = settings.get("build-constraint-dependencies", [])
    return Pins(tuple(pinned[:locked]), tuple(pinned[locked:]), tuple(build))


def resolve(root: Path, kept: Pins) -> tuple[Pins, str]:
    """The pins and the text of requirements.lock that uv finds when it keeps `kept`."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        extras: set[str] = set()
        for path in _projects(root):
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            extras |= _table(path).get("project", {}).get("optional-dependencies", {}).keys()
        top = copy / "pyproject.toml"
        top.write_text(replace_block(top.read_text(encoding="utf-8"), kept), encoding="utf-8")

        def export(*arguments: str) -> str:
            command = ["uv", "export", "--quiet", "--no-header", "--no-emit-workspace", *arguments]
            result = subprocess.run(
                command, cwd=copy, check=True, stdout=subprocess.PIPE, encoding="utf-8"
            )
            return result.stdout

        everything = ["--all-packages", "--all-extras", "--all-groups"]
        without = [f"--no-extra={extra}" for extra in sorted(VENDORS & extras)]
        lock = export(*everything, *without)
        locked = pins_of(lock)
        names = {Requirement(pin).name for pin in locked}
        every = pins_of(export(*everything))
        vendors = tuple(pin for pin in every if Requirement(pin).name not in names)
        return Pins(locked, vendors, pins_of(export("--only-group", BUILD_GROUP))), lock


def lock_problems(pins: Pins, lock: str | None) -> list[str]:
    """One sentence per difference between the pins and requirements.lock."""
    if lock is None:
        return [f"{LOCK} is missing; {WRITE}"]
    problems = [
        f"{LOCK} contains an address ({line.strip()}); {WRITE}"
        for line in lock.splitlines()
        if "://" in line
    ]
    try:
        locked = pins_of(lock)
    except InvalidRequirement as error:
        return [*problems, f"{LOCK} has a line that is no requirement ({error}); {WRITE}"]
    missing = sorted(set(pins.locked) - set(locked))
    unpinned = sorted(set(locked) - set(pins.locked))
    bare = [line for line in _entries(lock) if " --hash=sha256:" not in line]
    problems += [f"{LOCK} has no {pin}, which is pinned; {WRITE}" for pin in missing]
    problems += [f"{LOCK} has {entry}, which is not pinned; {WRITE}" for entry in unpinned]
    problems += [f"{LOCK} has no hash for {line}; {WRITE}" for line in bare]
    # Every other pin is exact because its entry in the lock is.
    problems += [
        f"the pin {pin} is not of one version; {WRITE}"
        for pin in pins.vendors
        if [specifier.operator for specifier in Requirement(pin).specifier] != ["=="]
    ]
    problems += [
        f"the pin {pin} for building is not one of the others; {WRITE}"
        for pin in pins.build
        if pin not in pins.locked
    ]
    return problems


def range_problems(pins: Pins, root: Path) -> list[str]:
    """One sentence per declared dependency that has no pin inside its range."""
    problems: list[str] = []
    pinned = [Requirement(pin) for pin in (*pins.locked, *pins.vendors)]
    build = [Requirement(pin) for pin in pins.build]
    projects = list(_projects(root))
    own = {canonicalize_name(_table(path)["project"]["name"]) for path in projects}
    for path in projects:
        where = path.relative_to(root)
        for text, candidates in [
            *((text, pinned) for text in _declared(_table(path))),
            *((text, build) for text in _table(path).get("build-system", {}).get("requires", [])),
        ]:
            wanted = Requirement(text)
            name = canonicalize_name(wanted.name)
            if name in own:
                continue
            found = [pin for pin in candidates if pin.name == name]
            inside = [wanted.specifier.contains(_version(pin), prereleases=True) for pin in found]
            # A range with a marker may be meant for one of several versions.
            if not found:
                problems.append(f"{where} declares {text!r}, which is not pinned; {WRITE}")
            elif not (any(inside) if wanted.marker else all(inside)):
                listed = ", ".join(map(str, found))
                problems.append(f"{where} declares {text!r}, but pinned is {listed}; {WRITE}")
    return problems


def installed_problems(pins: Pins, installed: Mapping[str, str]) -> list[str]:
    """One sentence per installed version that is not the pinned one."""
    problems: list[str] = []
    for pin in map(Requirement, pins.locked):
        version = installed.get(pin.name)
        if version is None or (pin.marker and not pin.marker.evaluate()):
            continue
        if not pin.specifier.contains(version, prereleases=True):
            problems.append(
                f"{pin.name} {version} is installed, but pinned is {pin}; run `uv sync`"
            )
    return problems


def installed_versions() -> dict[str, str]:
    """Name and version of every distribution in this environment."""
    return {canonicalize_name(found.name): found.version for found in distributions()}


def check(root: Path, installed: Mapping[str, str]) -> list[str]:
    """One sentence per problem, found without a network."""
    text = (root / "pyproject.toml").read_text(encoding="utf-8")
    pins = read_pins(text)
    try:
        if replace_block(text, pins) != text:
            return [f"the pins in pyproject.toml are not as they are written; {WRITE}"]
    except ValueError as error:
        return [str(error)]
    path = root / LOCK
    lock = path.read_text(encoding="utf-8") if path.exists() else None
    return [
        *lock_problems(pins, lock),
        *range_problems(pins, root),
        *installed_problems(pins, installed),
    ]


def write(root: Path, upgrade: list[str] | None) -> None:
    """Resolve and write both files; `upgrade` names what may move, and [] means everything."""
    top = root / "pyproject.toml"
    text = top.read_text(encoding="utf-8")
    moving = {canonicalize_name(name) for name in upgrade or []}
    kept = Pins() if upgrade == [] else read_pins(text).without(moving)
    pins, lock = resolve(root, kept)
    top.write_text(replace_block(text, pins), encoding="utf-8")
    (root / LOCK).write_text(lock, encoding="utf-8")


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Check the pins, or write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"resolve; write pins and {LOCK}")
    parser.add_argument(
        "--upgrade",
        nargs="*",
        metavar="NAME",
        help="with --write: take the newest release of these packages, without a name of all",
    )
    options = parser.parse_args(arguments)
    if options.upgrade is not None and not options.write:
        parser.error("--upgrade changes pins: give --write too")
    if options.write:
        try:
            write(root, options.upgrade)
        except ValueError as error:
            return report([str(error)])
        except subprocess.CalledProcessError as error:  # uv has printed why
            return report([f"uv could not resolve the workspace (exit {error.returncode})"])
        return report(check(root, {}), good=f"wrote the pins and {LOCK}")
    return report(check(root, installed_versions()), good=f"every version is pinned, as in {LOCK}")


def _entries(exported: str) -> list[str]:
    """Each requirement of the file on one line, with its hashes."""
    lines = (line.strip() for line in exported.replace("\\\n", "").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _lines(pins: tuple[str, ...]) -> str:
    return "".join(f'  "{pin}",\n' for pin in pins)


def _projects(root: Path) -> Iterator[Path]:
    yield root / "pyproject.toml"
    yield from sorted(root.glob("packages/*/pyproject.toml"))


def _table(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text(encoding="utf-8"))


def _declared(table: dict[str, Any]) -> Iterator[str]:
    """The requirements of a pyproject: dependencies, extras and groups."""
    project = table["project"]
    yield from project.get("dependencies", [])
    groups = [
        *project.get("optional-dependencies", {}).values(),
        *table.get("dependency-groups", {}).values(),
    ]
    for group in groups:
        yield from (entry for entry in group if isinstance(entry, str))  # a table names a group


def _version(pin: Requirement) -> str:
    (specifier,) = pin.specifier
    return specifier.version


if __name__ == "__main__":
    raise SystemExit(main())
