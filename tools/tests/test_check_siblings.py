from pathlib import Path

import pytest
from packaging.version import Version

from tools.check_siblings import range_around, sibling_problems
from tools.packages import find_packages


def problems(root: Path) -> list[str]:
    return sibling_problems(find_packages(root))


def test_a_range_that_contains_the_version_is_good(tmp_path: Path, make_package) -> None:
    make_package("a-core", "0.3.1")
    make_package("a-ring", dependencies=["a-core>=0.3,<0.4", "torch"], extra=["a-ring[other]"])
    assert problems(tmp_path) == []


def test_a_range_below_the_version_is_reported_with_its_repair(
    tmp_path: Path, make_package
) -> None:
    make_package("a-core", "0.4.0")
    make_package("a-ring", dependencies=["a-core>=0.3,<0.4"])
    (problem,) = problems(tmp_path)
    assert problem == (
        "a-ring asks for a-core<0.4,>=0.3, but a-core is 0.4.0 here; write >=0.4,<0.5"
    )


def test_ranges_in_extras_and_differently_spelt_names_count(tmp_path: Path, make_package) -> None:
    make_package("a-core", "0.4.0")
    make_package("a-models", extra=["A_Core[testing]<0.4"])
    assert len(problems(tmp_path)) == 1


def test_a_sibling_without_a_range_is_reported(tmp_path: Path, make_package) -> None:
    make_package("a-core", "0.4.0")
    make_package("a-ring", dependencies=["a-core"])
    (problem,) = problems(tmp_path)
    assert 'write "a-core>=0.4,<0.5"' in problem


@pytest.mark.parametrize(
    ("version", "expected"), [("0.1.0", ">=0.1,<0.2"), ("1.4.2", ">=1.4,<2"), ("2.0", ">=2.0,<3")]
)
def test_the_proposed_range_contains_the_version(version: str, expected: str) -> None:
    assert range_around(Version(version)) == expected
