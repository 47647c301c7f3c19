from importlib.metadata import version
from pathlib import Path

import pytest

from tools.lock import (
    VENDORS_LINE,
    Pins,
    check,
    installed_problems,
    lock_problems,
    pins_of,
    range_problems,
    read_pins,
    render_block,
    replace_block,
)
from tools.packages import ROOT

LOCK = """\
numpy==2.4.6 ; python_full_version < '3.12' \\
    --hash=sha256:00 \\
    --hash=sha256:01
    # via top
numpy==2.5.4 ; python_full_version >= '3.12' \\
    --hash=sha256:02
triton==3.9.0 ; sys_platform == 'linux' \\
    --hash=sha256:03
    # via
    #   torch
    #   top
"""
PINS = Pins(
    locked=(
        "numpy==2.4.6; python_full_version < '3.12'",
        "numpy==2.5.4; python_full_version >= '3.12'",
        "triton==3.9.0",
    ),
    vendors=("einops==0.8.2",),
    build=("triton==3.9.0",),
)
TOP = (
    f'[project]\nname = "top"\n[tool.uv]\npackage = false\n{render_block(PINS)}[tool.uv.sources]\n'
)


def test_a_pin_keeps_its_marker_only_where_a_package_has_several_versions() -> None:
    assert pins_of(LOCK) == PINS.locked


def test_what_is_written_is_read_again() -> None:
    assert read_pins(TOP) == PINS
    assert read_pins(replace_block(TOP, Pins())) == Pins()


def test_a_pin_is_forgotten_by_name() -> None:
    assert PINS.without({"numpy", "einops"}) == Pins(("triton==3.9.0",), (), ("triton==3.9.0",))


def test_pins_without_a_place_are_refused() -> None:
    with pytest.raises(ValueError, match="needs the lines '# Pins: `nox -s lock` writes"):
        replace_block(TOP.replace("# End of the pins.\n", ""), PINS)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("# End of the pins.\n", "", "needs the lines"),
        ('  "triton==3.9.0",\n]', '  "triton==3.9.0",  # fast\n]', "not as they are written"),
        ('  "triton==3.9.0",\n]', '  "triton>=3.9.0",\n]', "triton>=3.9.0 for building is not"),
        ("einops==0.8.2", "einops>=0.8.2", "the pin einops>=0.8.2 is not of one version"),
        ("triton==3.9.0", "triton==3.*", "has no triton==3.*, which is pinned"),
        (VENDORS_LINE, "", "has no einops==0.8.2, which is pinned"),
    ],
)
def test_pins_edited_by_hand(tmp_path: Path, old: str, new: str, problem: str) -> None:
    (tmp_path / "requirements.lock").write_text(LOCK)
    (tmp_path / "pyproject.toml").write_text(TOP)
    assert check(tmp_path, {}) == []
    changed = TOP.replace(old, new)
    assert changed != TOP
    (tmp_path / "pyproject.toml").write_text(changed)
    assert problem in " ".join(check(tmp_path, {}))


def test_more_hashes_for_a_release_are_no_problem() -> None:
    assert lock_problems(PINS, LOCK) == []
    more = LOCK.replace("    --hash=sha256:03\n", "    --hash=sha256:03 \\\n    --hash=sha256:04\n")
    assert more != LOCK
    assert lock_problems(PINS, more) == []


@pytest.mark.parametrize(
    ("old", "new", "problems"),
    [
        ("triton==3.9.0", "triton==3.9.1", ["no triton==3.9.0, which", "triton==3.9.1, which"]),
        ("'3.12'", "'3.11'", ["no numpy==2.4.6; py", "numpy==2.4.6; python_full_version < '3.11'"]),
        ("triton", "b==1 \\\n    --hash=sha256:05\ntriton", ["has b==1, which is not pinned"]),
        ("num", "--index-url https://example.org/\nnum", ["contains an address", "no requirement"]),
        (" \\\n    --hash=sha256:03", "", ["has no hash for triton==3.9.0"]),
    ],
)  # fmt: skip
def test_a_lock_that_is_not_of_the_pins(old: str, new: str, problems: list[str]) -> None:
    changed = LOCK.replace(old, new, 1)
    found = lock_problems(PINS, changed)
    assert len(found) == len(problems), found
    assert all(part in text for part, text in zip(problems, found, strict=True)), found


def test_a_missing_lock_is_reported() -> None:
    (problem,) = lock_problems(PINS, None)
    assert "is missing" in problem


@pytest.mark.parametrize(
    ("declared", "problem"),
    [
        ("Alpha_Beta>=1", None),
        ("alpha-beta>=3", "declares 'alpha-beta>=3', but pinned is alpha-beta==2.0"),
        ("gamma", "declares 'gamma', which is not pinned"),
        ("two<2; python_version < '3.12'", None),
        ("two<2", "declares 'two<2', but pinned is two==1"),
        ("a-core>=9", None),  # a member's version is check_siblings' business
    ],
)
@pytest.mark.parametrize("place", ["dependencies", "extra", "test_group"])
def test_every_declared_range_holds_its_pin(
    tmp_path: Path, make_package, declared: str, problem: str | None, place: str
) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "top"\n')
    make_package("a-core", **{place: [declared]})
    two = ("two==1; python_full_version < '3.12'", "two==2; python_full_version >= '3.12'")
    pins = Pins(("alpha-beta==2.0", *two), (), ("hatchling==1.30",))
    found = range_problems(pins, tmp_path)
    assert (problem is None) == (found == [])
    assert problem is None or f"packages/a-core/pyproject.toml {problem}" in found[0]


def test_what_builds_a_package_has_a_build_pin(tmp_path: Path, make_package) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "top"\n')
    make_package("a-core")
    (problem,) = range_problems(Pins(("hatchling==1.30",)), tmp_path)
    assert "declares 'hatchling>=1.27', which is not pinned" in problem
    (problem,) = range_problems(Pins((), (), ("hatchling==1.26",)), tmp_path)
    assert "but pinned is hatchling==1.26" in problem


def test_an_installed_version_is_the_pinned_one() -> None:
    pins = Pins(("a==1.0", "b==1; python_version < '3'", "b==2; python_version >= '3'", "c==1"))
    assert installed_problems(pins, {"a": "1.0+local", "b": "2", "other": "5"}) == []
    (problem,) = installed_problems(pins, {"a": "1.0.post1", "b": "2"})
    assert problem == "a 1.0.post1 is installed, but pinned is a==1.0; run `uv sync`"
    (problem,) = installed_problems(pins, {"b": "1"})
    assert "b 1 is installed, but pinned is b==2" in problem


def test_this_environment_has_the_pinned_versions() -> None:
    pins = read_pins((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f"pytest=={version('pytest')}" in pins.locked
    assert f"torch=={version('torch').partition('+')[0]}" in pins.locked
