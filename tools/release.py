"""Prepare the release of one package: version, changelog, build, checks, and the tag to set.

    uv run --group release python -m tools.release dilated-core 0.2.0

changes two files and leaves the commit, the tag and the upload to people and to the release
workflow. Nothing is changed when something is not ready.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

from packaging.version import InvalidVersion, Version

from tools.check_siblings import sibling_problems
from tools.packages import ROOT, Package, find_packages
from tools.report import report

UNRELEASED = re.compile(r"^## Unreleased\n(?P<entries>(?:(?!## ).*\n?)*)", re.MULTILINE)
VERSION_LINE = re.compile(r'^version = ".*"$', re.MULTILINE)


def tag_name(package: Package, version: Version) -> str:
    """`dilated-core-0.2.0`: packages are released one by one, so a tag names its package."""
    return f"{package.name}-{version}"


def release_problems(
    package: Package, version: Version, packages: dict[str, Package], root: Path
) -> list[str]:
    """Everything that stands against this release, one sentence each."""
    problems: list[str] = []
    if changed := _git(root, "status", "--porcelain"):
        problems.append(f"the tree has uncommitted changes, for example {changed.split()[1]}")
    tag = tag_name(package, version)
    if version < package.version:
        problems.append(f"{version} is older than {package.name}'s version, {package.version}")
    elif _git(root, "tag", "--list", tag):
        problems.append(f"the tag {tag} exists: this version was released")
    changelog = (package.folder / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = UNRELEASED.search(changelog)
    if unreleased is None or not unreleased["entries"].strip():
        problems.append(f"{package.name}/CHANGELOG.md has no entries under '## Unreleased'")
    problems += sibling_problems(packages | {package.name: replace(package, version=version)})
    return problems


def bump(package: Package, version: Version, day: date) -> None:
    """Write the version into pyproject.toml and turn '## Unreleased' into its heading."""
    _rewrite(package.folder / "pyproject.toml", VERSION_LINE, f'version = "{version}"')
    heading = f"## {version} ({day})\n"
    _rewrite(package.folder / "CHANGELOG.md", UNRELEASED, heading + r"\g<entries>")


def build(package: Package, version: Version, root: Path) -> list[Path]:
    """Build the package into dist/ and check the two files as an index would."""
    subprocess.run(
        ["uv", "build", "--quiet", "--package", package.name, "--out-dir", "dist"],
        cwd=root,
        check=True,
    )
    files = sorted((root / "dist").glob(f"{package.import_name}-{version}[-.]*"))
    checks = [
        [sys.executable, "-m", "twine", "check", "--strict"],
        ["uv", "publish", "--dry-run", "--trusted-publishing", "never"],
    ]
    for check in checks:
        subprocess.run([*check, *map(str, files)], cwd=root, check=True)
    return files


def _rewrite(path: Path, pattern: re.Pattern[str], replacement: str) -> None:
    text = path.read_text(encoding="utf-8")
    path.write_text(pattern.sub(replacement, text, count=1), encoding="utf-8")


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True
    ).stdout


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Prepare one release."""
    packages = find_packages(root)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", choices=packages)
    parser.add_argument("version", help="the new version, such as 0.2.0")
    parser.add_argument("--date", type=date.fromisoformat, default=date.today(), help="YYYY-MM-DD")
    options = parser.parse_args(arguments)
    package = packages[options.package]
    try:
        version = Version(options.version)
    except InvalidVersion:
        return report([f"{options.version!r} is not a version; write one like 0.2.0"])
    if problems := release_problems(package, version, packages, root):
        return report(problems)

    paths = [package.folder / name for name in ("pyproject.toml", "CHANGELOG.md")]
    before = {path: path.read_bytes() for path in paths}
    try:
        bump(package, version, options.date)
        files = build(package, version, root)
    except BaseException as error:
        for path, content in before.items():
            path.write_bytes(content)
        if isinstance(error, subprocess.CalledProcessError):  # the program has printed why
            return report([f"{' '.join(error.cmd[:3])} failed; nothing was changed"])
        raise
    tag = tag_name(package, version)
    built = ", ".join(file.name for file in files)
    return report([], f"built {built}\nnext: git commit -am 'Release {tag}' && git tag {tag}")


if __name__ == "__main__":
    raise SystemExit(main())
