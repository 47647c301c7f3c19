"""The workspace's packages, read from `packages/*/pyproject.toml`.

Everything that handles "every package" asks here, so a new folder under `packages/` is
tested, built and checked without being listed anywhere else.
"""

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Package:
    """One workspace member."""

    name: str
    version: Version
    folder: Path
    published: tuple[Requirement, ...]
    """What the built package asks for: its dependencies and all its extras."""
    test_group: tuple[Requirement, ...]
    """What its tests ask for besides; a dependency group is not part of a built package."""

    @property
    def import_name(self) -> str:
        """The module to import."""
        return self.name.replace("-", "_")


def find_packages(root: Path = ROOT) -> dict[str, Package]:
    """All members by name, in alphabetical order."""
    paths = sorted(root.glob("packages/*/pyproject.toml"))
    packages = [_read(path) for path in paths]
    return {package.name: package for package in packages}


def with_siblings(package: Package, packages: dict[str, Package]) -> list[Package]:
    """The package and every member that it or its tests need, directly or not."""
    found = {package.name: package}
    waiting = [*package.published, *package.test_group]
    while waiting:
        sibling = packages.get(canonicalize_name(waiting.pop().name))
        if sibling is not None and sibling.name not in found:
            found[sibling.name] = sibling
            waiting.extend(sibling.published)
    return list(found.values())


def _read(path: Path) -> Package:
    table = tomllib.loads(path.read_text(encoding="utf-8"))
    project = table["project"]
    extras = project.get("optional-dependencies", {}).values()
    published = [*project.get("dependencies", []), *(text for extra in extras for text in extra)]
    return Package(
        name=canonicalize_name(project["name"]),
        version=Version(project["version"]),
        folder=path.parent,
        published=_requirements(published),
        test_group=_requirements(table.get("dependency-groups", {}).get("test", [])),
    )


def _requirements(texts: Iterable[str]) -> tuple[Requirement, ...]:
    return tuple(Requirement(text) for text in texts)
