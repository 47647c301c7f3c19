from pathlib import Path

import pytest

from tools.check_lock import lock_problems, main

RESOLVED = "numpy==2.0 \\\n    --hash=sha256:00\n"


def test_the_same_text_is_good() -> None:
    assert lock_problems(RESOLVED, RESOLVED) == []


def test_a_difference_is_named() -> None:
    (problem,) = lock_problems("numpy==1.9 \\\n    --hash=sha256:00\n", RESOLVED)
    assert "for example at 'numpy==1.9'" in problem


def test_a_missing_file_is_reported() -> None:
    (problem,) = lock_problems(None, RESOLVED)
    assert "is missing" in problem


def test_an_address_is_refused_even_if_uv_writes_it() -> None:
    text = "--index-url https://example.org/\n" + RESOLVED
    (problem,) = lock_problems(text, text)
    assert "contains an address (--index-url https://example.org/)" in problem


def test_write_then_check_then_change(
    tmp_path: Path, make_package, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "top"\nversion = "0"\nrequires-python = ">=3.11"\n'
        '[tool.uv]\npackage = false\n[tool.uv.workspace]\nmembers = ["packages/*"]\n'
    )
    make_package("a-core")
    assert main([], tmp_path) == 1
    assert "is missing" in capsys.readouterr().err
    assert main(["--write"], tmp_path) == 0
    assert main([], tmp_path) == 0
    # The workspace's own packages are not in the lock, and neither is a file it resolved to.
    assert "a-core" not in (tmp_path / "requirements.lock").read_text()
    assert not (tmp_path / "uv.lock").exists()
    (tmp_path / "requirements.lock").write_text("numpy==1.0\n")
    assert main([], tmp_path) == 1


def test_an_impossible_requirement_is_one_line(
    tmp_path: Path, make_package, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "top"\nversion = "0"\nrequires-python = ">=3.11"\n'
        'dependencies = ["a-core>=9"]\n[tool.uv]\npackage = false\n'
        '[tool.uv.workspace]\nmembers = ["packages/*"]\n'
    )
    assert main([], tmp_path) == 1
    assert "uv could not resolve the workspace" in capsys.readouterr().err
