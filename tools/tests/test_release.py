import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import release

CHANGELOG = """\
# Changelog

## Unreleased

- Faster.

## 0.1.0 (2026-01-01)

- First.
"""


@pytest.fixture
def core(tmp_path: Path, make_package, commit_all: Callable[[], None]) -> Path:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "top"\nversion = "0"\nrequires-python = ">=3.11"\n'
        '[tool.uv]\npackage = false\n[tool.uv.workspace]\nmembers = ["packages/*"]\n'
        "[tool.uv.sources]\na-core = { workspace = true }\n"
    )
    (tmp_path / ".gitignore").write_text("uv.lock\ndist/\n")
    make_package("a-ring", dependencies=["a-core>=0.1,<0.2"])
    folder = make_package("a-core", changelog=CHANGELOG)
    commit_all()
    return folder


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the tool without a build; that is tried once, below."""
    monkeypatch.setattr(release, "build", lambda *_: [Path("a.whl")])
    return lambda *arguments: release.main([*arguments, "--date", "2026-02-03"], tmp_path)


def unchanged(core: Path) -> bool:
    status = ["git", "status", "--porcelain", "--", "packages"]
    return not subprocess.run(status, cwd=core.parent.parent, capture_output=True).stdout


def test_version_and_changelog_are_rolled(
    core: Path, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare("a-core", "0.1.1") == 0
    assert 'version = "0.1.1"\n' in (core / "pyproject.toml").read_text()
    rolled = CHANGELOG.replace("## Unreleased", "## 0.1.1 (2026-02-03)")
    assert (core / "CHANGELOG.md").read_text() == rolled
    assert "git tag a-core-0.1.1" in capsys.readouterr().out


def test_the_first_release_keeps_its_version(core: Path, prepare: Callable[..., int]) -> None:
    assert prepare("a-core", "0.1.0") == 0


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("0.0.9", "0.0.9 is older than a-core's version, 0.1.0"),
        ("0.2.0", "a-ring asks for a-core<0.2,>=0.1, but a-core is 0.2.0 here"),
        ("new", "'new' is not a version"),
    ],
)
def test_a_wrong_version_is_refused(
    core: Path,
    prepare: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    version: str,
    message: str,
) -> None:
    assert prepare("a-core", version) == 1
    assert message in capsys.readouterr().err
    assert unchanged(core)


def test_a_released_version_is_refused(
    core: Path, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["git", "tag", "a-core-0.1.0"], cwd=core, check=True)
    assert prepare("a-core", "0.1.0") == 1
    assert "the tag a-core-0.1.0 exists" in capsys.readouterr().err


def test_a_dirty_tree_is_refused(
    core: Path, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    (core / "README.md").write_text("changed\n")
    assert prepare("a-core", "0.1.1") == 1
    assert "uncommitted changes, for example packages/a-core/README.md" in capsys.readouterr().err


def test_a_changelog_without_entries_is_refused(
    core: Path, prepare: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ["# Changelog\n\n## 0.1.0 (2026-01-01)\n", CHANGELOG.replace("- Faster.\n", "")]:
        (core / "CHANGELOG.md").write_text(text)
        assert prepare("a-core", "0.1.1") == 1
        assert "no entries under '## Unreleased'" in capsys.readouterr().err


def test_a_failed_build_changes_nothing(
    core: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise subprocess.CalledProcessError(1, ["uv", "build", "--quiet", "--package"])

    monkeypatch.setattr(release, "build", fail)
    assert release.main(["a-core", "0.1.1"], tmp_path) == 1
    assert "uv build --quiet failed; nothing was changed" in capsys.readouterr().err
    assert unchanged(core)


def test_the_built_files_are_checked(
    core: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, commands = subprocess.run, []
    # The installed hatchling builds: another environment would be filled from an index.
    monkeypatch.setenv("UV_NO_BUILD_ISOLATION", "1")
    monkeypatch.setenv("UV_PYTHON", sys.executable)
    monkeypatch.setenv("UV_OFFLINE", "1")

    def record(command: list[str], **options: object) -> object:
        commands.append(command)
        if "build" in command or command[0] == "git":
            return run(command, **options)
        return None  # twine is in the release group only, and uv would ask the index

    monkeypatch.setattr(subprocess, "run", record)
    assert release.main(["a-core", "0.1.1"], tmp_path) == 0
    files = [
        str(tmp_path / "dist" / name)
        for name in ("a_core-0.1.1-py3-none-any.whl", "a_core-0.1.1.tar.gz")
    ]
    assert all(Path(file).is_file() for file in files)
    assert [sys.executable, "-m", "twine", "check", "--strict", *files] in commands
    assert ["uv", "publish", "--dry-run", "--trusted-publishing", "never", *files] in commands
