"""Write the API reference from docstrings: `python -m tools.api_pages` fills docs/reference/.

Nothing is imported. Names and signatures come from docs/api/*.txt, which a check compares with the
packages; docstrings come from the sources; groups of names are the comments in `__all__`.
`nox -s docs` runs this before it builds the site. The pages are not committed.
"""

import ast
import inspect
import re
import shutil
import sys
from collections import ChainMap
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tools.packages import ROOT, Package, find_packages

FOLDER = ROOT / "docs" / "reference"
Documented = ast.ClassDef | ast.FunctionDef

_SECTION = re.compile(r"(Args|Attributes|Example|Raises|Returns|Yields)( \(.*\))?::?")
_LISTS = ("Args", "Attributes", "Raises")
_LONGEST_LINE = 88


class Entry(NamedTuple):
    """A public name: its signature as in docs/api, its members', and its definition."""

    name: str
    signature: str
    members: list[tuple[str, str]]
    definition: Documented | None


def main() -> int:
    """Write one page per package."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    packages = find_packages(ROOT)
    modules = {name: read_modules(package) for name, package in packages.items()}
    places = {
        entry.name: name
        for name, entries_by_module in reversed(modules.items())
        for entries in entries_by_module.values()
        for entry in entries
    }
    for name, package in packages.items():
        (FOLDER / f"{name}.md").write_text(page(package, modules[name], places), encoding="utf-8")
    return 0


def read_modules(package: Package) -> dict[str, list[Entry]]:
    """The public names of each public module of a package."""
    # A name may be another package's, exported once more.
    sources = [each.folder / "src" for each in find_packages(ROOT).values()]
    everywhere = ChainMap(*(_definitions(source) for source in sources))
    definitions = ChainMap(_definitions(package.folder / "src"), everywhere)
    modules: dict[str, list[Entry]] = {}
    entries: list[Entry] = []
    text = (ROOT / "docs" / "api" / f"{package.name}.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            entries = modules.setdefault(line.strip("[]"), [])
        elif line.startswith("    "):
            name, signature = _split(line.strip())
            entries[-1].members.append((name, signature))
        elif line:
            name, signature = _split(line.removeprefix("class "))
            entries.append(Entry(name, signature, [], definitions.get(name)))
    return modules


def page(package: Package, modules: Mapping[str, list[Entry]], places: Mapping[str, str]) -> str:
    """The page of a package as Markdown; `places` has the package of each public name."""
    lines = [f"# {package.name}", ""]
    for module, entries in modules.items():
        path = _path(package, module)
        lines += [] if module == package.import_name else [f"## {module} {{ #{module} }}", ""]
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        lines += [_linked(docstring, package, places), ""]
        by_name = {entry.name: entry for entry in entries}
        for group, names in _groups(path, list(by_name)):
            lines += [f"## {group[0].upper()}{group[1:]}", ""] if group else []
            for name in names:
                lines += _describe(by_name[name], package, places)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def _describe(entry: Entry, package: Package, places: Mapping[str, str]) -> Iterator[str]:
    keyword = "class " if isinstance(entry.definition, ast.ClassDef) else ""
    yield f"### {entry.name} {{ #{entry.name} }}\n"
    if entry.signature:
        yield _code(f"{keyword}{entry.name}{entry.signature}")
    if entry.definition is None:
        return
    yield _linked(markdown(ast.get_docstring(entry.definition) or ""), package, places) + "\n"
    methods = {
        node.name: ast.get_docstring(node)
        for node in entry.definition.body
        if isinstance(node, ast.FunctionDef)
    }
    for member, signature in entry.members:
        name = member.rpartition(".")[2]
        if (docstring := methods.get(name)) and name != "extra_repr":
            yield f"#### {member} {{ #{member} }}\n"
            if signature:
                yield _code(member + re.sub(r"^\((self|cls)(, )?", "(", signature))
            yield _linked(markdown(docstring), package, places) + "\n"


def markdown(docstring: str) -> str:
    """A docstring with Google's sections as Markdown: bold titles, lists and example blocks."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(docstring).splitlines():
        match = _SECTION.fullmatch(line)
        if section and line and not line.startswith(" "):
            lines += _end_of(section, lines)
            section = ""
        if match:
            section = match[1]
            # "Example::" is code that is not typed at a prompt.
            language = "python" if line.endswith("::") else "pycon"
            lines += ["", f"**{section}**", ""]
            lines += [f"```{language}"] if section == "Example" else []
        elif line or not lines[-1].startswith("```"):
            lines.append(_in_section(line, section) if section else line)
    lines += _end_of(section, lines)
    while lines and not lines[-1]:
        lines.pop()
    return "\n".join(lines)


def _end_of(section: str, lines: list[str]) -> list[str]:
    """What ends a section; empty lines at the end of a block of code are removed from `lines`."""
    if section != "Example":
        return []
    while not lines[-1]:
        lines.pop()
    return ["```", ""]


def _in_section(line: str, section: str) -> str:
    """A line of a section: an item of a list begins where a line is indented once."""
    text = line[4:]
    if section not in _LISTS or not text or text.startswith(" "):
        return text
    name, colon, rest = text.partition(": ")
    return f"- `{name}`: {rest}" if colon else f"- {text}"


def _linked(text: str, package: Package, places: Mapping[str, str]) -> str:
    """The text with each public name between backticks as a link, except in blocks of code."""

    def link(match: re.Match[str]) -> str:
        place = places.get(match[1])
        if place is None:
            return match[0]
        return f"[`{match[1]}`]({'' if place == package.name else f'{place}.md'}#{match[1]})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if part.startswith("```") else re.sub(r"(?<!- )`(\w+)`", link, part) for part in parts
    )


def _code(signature: str) -> str:
    """A signature as a block of code, an argument a line if it is long."""
    if len(signature) > _LONGEST_LINE:
        name, _, arguments = signature.partition("(")
        broken = re.sub(r", (?=\*|\w+[,=)]|\w+$)", ",\n    ", arguments.removesuffix(")"))
        signature = f"{name}(\n    {broken},\n)"
    return f"```python\n{signature}\n```\n"


def _groups(path: Path, names: list[str]) -> list[tuple[str, list[str]]]:
    """The names by the comments between them in `__all__`, in that order."""
    listed = re.search(
        r"^__all__ = \[\n(.*?)^\]", path.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    if listed is None or "#" not in listed[1]:
        return [("", names)]
    groups: list[tuple[str, list[str]]] = []
    for line in listed[1].splitlines():
        word = line.strip().rstrip(",")
        if word.startswith("#"):
            groups.append((word.lstrip("# "), []))
        else:
            groups[-1][1].append(word.strip('"'))
    return groups


@cache
def _definitions(source: Path) -> dict[str, Documented]:
    """Every class and function at the top level of a module in a folder, by each of its names."""
    paths = sorted(source.rglob("*.py"), reverse=True)
    nodes = [node for path in paths for node in ast.parse(path.read_text(encoding="utf-8")).body]
    definitions = {node.name: node for node in nodes if isinstance(node, Documented)}
    for node in nodes:
        match node:
            case ast.Assign([ast.Name(id=name)], ast.Name(id=other)) if other in definitions:
                definitions[name] = definitions[other]
            case _:
                pass
    return definitions


def _path(package: Package, module: str) -> Path:
    path = package.folder / "src" / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _split(text: str) -> tuple[str, str]:
    """A name and the signature behind it, without what only catches unknown arguments."""
    name, bracket, rest = text.partition("(")
    return name, (bracket + rest).replace(", **unknown", "")


if __name__ == "__main__":
    sys.exit(main())
