"""Use the packages from a bare source tree, where nothing of ours is installed.

A package on the import path is not yet a distribution: its version and its entry points come from
metadata that only an installation writes. This module writes that metadata into a folder of its
own, for every package it finds under `packages/`, and names the environment in which a new Python
process sees all of it. It needs nothing but the standard library.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def package_folders(root: Path) -> list[Path]:
    """Folders of all packages, in alphabetical order."""
    return sorted(path.parent for path in root.glob("packages/*/pyproject.toml"))


def write_metadata(root: Path, folder: Path) -> None:
    """Write `NAME-VERSION.dist-info` into `folder` for every package under `root`."""
    for package in package_folders(root):
        table = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))
        project = table["project"]
        name, version = project["name"], project["version"]
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        metadata = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        metadata += [f"Requires-Dist: {text}" for text in project.get("dependencies", [])]
        (info / "METADATA").write_text("\n".join(metadata) + "\n", encoding="utf-8")
        (info / "entry_points.txt").write_text(_entry_points(project), encoding="utf-8")


def bare_environment(
    root: Path, folder: Path, environment: Mapping[str, str] | None = None
) -> dict[str, str]:
    """`environment` (default: this process's) with the packages and their metadata in front.

    Whatever is installed comes later on the path, so that the tree is what gets tested.
    """
    result = dict(os.environ if environment is None else environment)
    paths = [str(folder), *(str(package / "src") for package in package_folders(root))]
    if before := result.get("PYTHONPATH"):
        paths.append(before)
    result["PYTHONPATH"] = os.pathsep.join(paths)
    result["PYTHONDONTWRITEBYTECODE"] = "1"  # the tree stays as it was
    return result


def _entry_points(project: dict[str, Any]) -> str:
    groups: dict[str, dict[str, str]] = dict(project.get("entry-points", {}))
    if scripts := project.get("scripts"):
        groups["console_scripts"] = scripts
    lines: list[str] = []
    for group, entries in groups.items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {target}" for name, target in entries.items()]
    return "\n".join(lines) + "\n"
