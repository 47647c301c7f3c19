import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from tools.packages import ROOT, find_packages, with_siblings


def test_a_plain_uv_run_has_every_extra_of_the_command_line() -> None:
    def project(folder: Path) -> dict:
        return tomllib.loads((folder / "pyproject.toml").read_text())["project"]

    asked = {r.name: r.extras for r in map(Requirement, project(ROOT)["dependencies"])}
    extras = project(ROOT / "packages" / "dilated-models")["optional-dependencies"]
    # Large, and only --tensorboard and another trainer need them; they are tested with the package.
    assert asked["dilated-models"] == set(extras) - {"lightning", "tensorboard"}


def test_members_are_found_with_what_they_ask_for(tmp_path: Path, make_package) -> None:
    make_package("a-core", "1.2.3")
    folder = make_package(
        "a-ring", dependencies=["a-core>=1,<2"], extra=["click"], test_group=["pytest"]
    )
    packages = find_packages(tmp_path)
    assert list(packages) == ["a-core", "a-ring"]
    assert packages["a-core"].version == Version("1.2.3")
    ring = packages["a-ring"]
    assert (ring.import_name, ring.folder) == ("a_ring", folder)
    assert [requirement.name for requirement in ring.published] == ["a-core", "click"]
    assert [requirement.name for requirement in ring.test_group] == ["pytest"]


def test_siblings_are_followed_through_one_another(tmp_path: Path, make_package) -> None:
    make_package("a-core")
    make_package("a-ring", dependencies=["a-core>=0.1,<0.2", "torch"])
    make_package("a-models", extra=["a_ring>=0.1,<0.2"])
    make_package("a-sparse")
    packages = find_packages(tmp_path)
    names = {package.name for package in with_siblings(packages["a-models"], packages)}
    assert names == {"a-models", "a-ring", "a-core"}
    assert with_siblings(packages["a-core"], packages) == [packages["a-core"]]
