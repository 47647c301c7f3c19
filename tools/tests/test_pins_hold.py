"""Releases that appear later change nothing: tried offline, with uv and an index of tiny wheels.

The index is a folder: one page for each name, with the hash of each wheel.
"""

import hashlib
import os
import subprocess
import zipfile
from pathlib import Path

import pytest

from tools import lock
from tools.lock import LOCK, main

CALM = {"alpha": "1.0", "beta": "1.0", "hatchling": "1.27", "vendor": "1.0"}
MOVED = {
    "alpha": "1.1",
    "beta": "2.0",
    "hatchling": "1.30",
    "newcomer": "1.0",
    "vendor": "1.0.post1",
}


@pytest.fixture
def workspace(
    tmp_path: Path,
    make_package,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Path:
    """A workspace with pins and a lock, which knows no index but the folder `index/`."""
    for name in [name for name in os.environ if name.startswith("UV_")]:
        monkeypatch.delenv(name)  # one of them may name another index
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.setattr(lock, "installed_versions", dict)  # this environment has a hatchling, too
    (tmp_path / "pyproject.toml").write_text(f"""\
[project]
name = "top"
version = "0"
requires-python = ">=3.11"
dependencies = ["alpha>=1"]

[project.optional-dependencies]
flash = ["vendor"]

[dependency-groups]
build = ["hatchling>=1.27"]

[tool.uv]
package = false
offline = true
index = [{{ url = "{(tmp_path / "index").as_uri()}", default = true }}]
# Pins: `nox -s lock` writes them.
# End of the pins.

[tool.uv.workspace]
members = ["packages/*"]
""")
    make_package("a-core", dependencies=["beta>=1"])
    release(tmp_path, "alpha", "1.0", requires="beta")
    release(tmp_path, "beta", "1.0")
    release(tmp_path, "vendor", "1.0")
    release(tmp_path, "hatchling", "1.27")
    assert main(["--write"], tmp_path) == 0
    capsys.readouterr()
    return tmp_path


def release(root: Path, name: str, version: str, requires: str = "", build: str = "") -> None:
    """Put a wheel into the index."""
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += f"Requires-Dist: {requires}\n" if requires else ""
    tag = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    folder = root / "index" / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}{build}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}.py", f"build = {build!r}\n")
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", tag)
        wheel.writestr(f"{info}/RECORD", "")
    with (folder / "index.html").open("a") as page:
        page.write(f'<a href="{path.name}#sha256={sha256(path)}">{path.name}</a>\n')


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def release_newer(root: Path) -> None:
    """A later day: a newer release of everything, one of them with a new dependency."""
    release(root, "alpha", "1.1", requires="newcomer")
    for name, version in [("beta", "2.0"), ("vendor", "1.0.post1"), ("newcomer", "1.0")]:
        release(root, name, version)
    release(root, "hatchling", "1.30")


def resolved(root: Path) -> dict[str, str]:
    """What a fresh clone resolves to."""
    (root / "uv.lock").unlink(missing_ok=True)
    command = "uv export --quiet --no-header --no-emit-workspace --no-hashes --no-annotate"
    command += " --all-packages --all-extras --all-groups"
    result = subprocess.run(command.split(), cwd=root, check=True, capture_output=True, text=True)
    return dict(line.split("==") for line in result.stdout.splitlines())


def built_with(root: Path) -> str:
    """The build backend that uv finds for a package, from its build pins."""
    command = ["uv", "build", "--wheel", "--verbose", "--out-dir", "dist", "packages/a-core"]
    # The tiny backend cannot build, which is as well: uv has chosen it by then.
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    (line,) = {line for line in result.stderr.splitlines() if "Selecting: hatchling==" in line}
    return line.partition("hatchling==")[2].split()[0]


def files(root: Path) -> tuple[str, str]:
    return (root / "pyproject.toml").read_text(), (root / LOCK).read_text()


def test_newer_releases_do_not_move_a_resolution(workspace: Path) -> None:
    assert resolved(workspace) == CALM
    assert built_with(workspace) == CALM["hatchling"]
    release_newer(workspace)
    assert resolved(workspace) == CALM
    assert built_with(workspace) == CALM["hatchling"]
    assert main([], workspace) == 0


def test_without_the_pins_it_moves(workspace: Path) -> None:
    release_newer(workspace)
    top = workspace / "pyproject.toml"
    lines = top.read_text().splitlines(keepends=True)
    top.write_text("".join(line for line in lines if "==" not in line))
    assert resolved(workspace) == MOVED
    assert built_with(workspace) == "1.30"


def test_writing_again_changes_nothing_but_hashes(workspace: Path) -> None:
    before = files(workspace)
    release_newer(workspace)
    assert main(["--write"], workspace) == 0
    assert files(workspace) == before
    # Another wheel of an old release: one more hash, which the check does not need.
    release(workspace, "beta", "1.0", build="-1")
    assert main([], workspace) == 0
    assert main(["--write"], workspace) == 0
    pyproject, written = files(workspace)
    assert pyproject == before[0]
    assert written.count("--hash") == before[1].count("--hash") + 1


def test_the_lock_leaves_the_vendors_out_and_has_no_address(workspace: Path) -> None:
    pyproject, written = files(workspace)
    assert '"vendor==1.0",' in pyproject
    assert "vendor" not in written
    assert "beta==1.0" in written
    assert "a-core==" not in written
    assert "/" not in written
    assert not (workspace / "uv.lock").exists()


@pytest.mark.parametrize(
    ("names", "moved"),
    [
        ([], MOVED),
        (["beta"], {"beta": "2.0"}),
        (["Alpha", "hatchling"], {"alpha": "1.1", "newcomer": "1.0", "hatchling": "1.30"}),
    ],
)
def test_a_maintainer_moves_all_or_some(workspace: Path, names, moved) -> None:
    release_newer(workspace)
    assert main(["--write", "--upgrade", *names], workspace) == 0
    assert main([], workspace) == 0
    assert resolved(workspace) == CALM | moved


def test_a_new_dependency_gets_its_pin(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release_newer(workspace)
    member = workspace / "packages/a-core/pyproject.toml"
    member.write_text(member.read_text().replace("'beta>=1'", "'beta>=1', 'newcomer'"))
    assert main([], workspace) == 1
    assert "declares 'newcomer', which is not pinned" in capsys.readouterr().err
    assert main(["--write"], workspace) == 0
    assert main([], workspace) == 0
    assert resolved(workspace) == CALM | {"newcomer": "1.0"}


def test_a_range_that_leaves_its_pin(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    release_newer(workspace)
    member = workspace / "packages/a-core/pyproject.toml"
    member.write_text(member.read_text().replace("beta>=1", "beta>=2"))
    before = files(workspace)
    assert main([], workspace) == 1
    assert "declares 'beta>=2', but pinned is beta==1.0" in capsys.readouterr().err
    assert main(["--write"], workspace) == 1
    assert "uv could not resolve the workspace" in capsys.readouterr().err
    assert files(workspace) == before
    assert main(["--write", "--upgrade", "beta"], workspace) == 0
    assert resolved(workspace) == CALM | {"beta": "2.0"}
