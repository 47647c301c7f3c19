"""Small workspaces in temporary folders: the tools are tested on trees made for it."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

MakePackage = Callable[..., Path]


@pytest.fixture
def make_package(tmp_path: Path) -> MakePackage:
    def make(
        name: str,
        version: str = "0.1.0",
        *,
        dependencies: list[str] | None = None,
        extra: list[str] | None = None,
        test_group: list[str] | None = None,
        changelog: str = "# Changelog\n",
    ) -> Path:
        folder = tmp_path / "packages" / name
        module = folder / "src" / name.replace("-", "_")
        module.mkdir(parents=True)
        (module / "__init__.py").write_text('"""A package."""\n')
        (folder / "README.md").write_text(f"# {name}\n")
        (folder / "CHANGELOG.md").write_text(changelog)
        (folder / "pyproject.toml").write_text(f"""\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "{name}"
version = "{version}"
description = "A package."
readme = "README.md"
requires-python = ">=3.11"
dependencies = {dependencies or []}

[project.optional-dependencies]
more = {extra or []}

[dependency-groups]
test = {test_group or []}
""")
        return folder

    return make


@pytest.fixture
def commit_all(tmp_path: Path) -> Callable[[], None]:
    """Make the temporary tree a clean git repository."""

    def commit() -> None:
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for arguments in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "-m", "All"]):
            subprocess.run([*git, *arguments], cwd=tmp_path, check=True)

    return commit
