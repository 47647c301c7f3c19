"""docs/api/PACKAGE.txt lists the public names and signatures of a package; `--write` makes it so.

Public is what a module's `__all__` lists. A change of the public surface then shows up in a
review as a change of these files, wanted or not. Annotations are left out: the type checker
reads those, and Python versions print them differently.
"""

import argparse
import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_origin

from tools.packages import ROOT, Package, find_packages
from tools.report import report

WRITE = "uv run python -m tools.check_api --write"


def listing(package: Package) -> str:
    """The public surface of a package as text, one line per name."""
    lines: list[str] = []
    for name in public_modules(package.folder / "src"):
        module = importlib.import_module(name)
        lines.append(f"[{name}]")
        for public in sorted(module.__all__):
            lines.extend(describe(public, getattr(module, public)))
        lines.append("")
    return "\n".join(lines)


def public_modules(source: Path) -> list[str]:
    """Dotted names of the modules that define `__all__`, found without importing anything."""
    found: list[str] = []
    for path in sorted(source.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = [
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        ]
        if "__all__" in assigned:
            parts = path.relative_to(source).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(found)


def describe(name: str, value: object) -> Iterator[str]:
    """The line of one name; a class is followed by its own public methods and properties."""
    if not inspect.isclass(value):
        # The alias of a type can be called, but is no function.
        is_function = callable(value) and get_origin(value) is None
        yield name + (signature(value) if is_function else "")
        return
    yield f"class {name}{signature(value)}"
    for member, attribute in sorted(vars(value).items()):
        if not member.startswith("_"):
            function = inspect.unwrap(getattr(attribute, "__func__", attribute))
            yield f"    {name}.{member}" + (signature(function) if callable(function) else "")


def signature(value: object) -> str:
    """`(q, k, *, scale=None)`: names, kinds and defaults."""
    try:
        read = inspect.signature(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):  # some classes written in C do not tell
        return "(...)"
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in read.parameters.values()
    ]
    return str(read.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def api_problems(name: str, committed: str, actual: str) -> list[str]:
    """One sentence per name that the committed listing lacks or has too many."""
    have, want = (set(text.splitlines()) for text in (committed, actual))
    problems = [f"{name}: {line.strip()} is gone" for line in sorted(have - want)]
    problems += [f"{name}: {line.strip()} is new" for line in sorted(want - have)]
    return problems


def main(arguments: list[str] | None = None) -> int:
    """Check or write the listings."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/api/*.txt")
    write = parser.parse_args(arguments).write
    problems: list[str] = []
    packages = find_packages()
    for package in packages.values():
        path = ROOT / "docs" / "api" / f"{package.name}.txt"
        actual = listing(package)
        if write:
            path.parent.mkdir(exist_ok=True)
            path.write_text(actual, encoding="utf-8")
        committed = path.read_text(encoding="utf-8") if path.exists() else ""
        problems += api_problems(package.name, committed, actual)
    if problems:
        problems.append(f"docs/api lists other public names; if that is intended: {WRITE}")
    return report(problems, good=f"public names as listed: {', '.join(packages)}")


if __name__ == "__main__":
    raise SystemExit(main())
