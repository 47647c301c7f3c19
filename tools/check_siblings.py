"""Each range on a sibling package contains the sibling's current version.

uv takes a workspace member as it is and does not compare it with the range, so a wrong range
would first be noticed by the people who install the published packages.
"""

from packaging.utils import canonicalize_name
from packaging.version import Version

from tools.packages import Package, find_packages
from tools.report import report


def sibling_problems(packages: dict[str, Package]) -> list[str]:
    """One sentence per range that is missing or leaves the sibling's version out."""
    problems: list[str] = []
    for package in packages.values():
        for requirement in package.published:
            name = canonicalize_name(requirement.name)
            if name not in packages or name == package.name:  # an extra may name its own package
                continue
            version = packages[name].version
            if not requirement.specifier:
                problems.append(
                    f"{package.name} depends on {name} without a range; write "
                    f'"{name}{range_around(version)}"'
                )
            elif not requirement.specifier.contains(version, prereleases=True):
                problems.append(
                    f"{package.name} asks for {name}{requirement.specifier}, but {name} is "
                    f"{version} here; write {range_around(version)}"
                )
    return problems


def range_around(version: Version) -> str:
    """The usual range: below 1.0 a minor release may break, from then on a major one."""
    if version.major == 0:
        return f">=0.{version.minor},<0.{version.minor + 1}"
    return f">={version.major}.{version.minor},<{version.major + 1}"


def main() -> int:
    """Check this workspace."""
    packages = find_packages()
    return report(sibling_problems(packages), good=f"sibling ranges hold: {', '.join(packages)}")


if __name__ == "__main__":
    raise SystemExit(main())
