from pathlib import Path

from tools.check_lengths import LIMIT, length_problems, measure


def test_only_files_over_the_limit_are_reported() -> None:
    (problem,) = length_problems({"a.py": LIMIT, "b.py": LIMIT + 1}, {})
    assert problem.startswith(f"b.py has {LIMIT + 1} lines")


def test_an_exception_excuses_a_long_file_and_no_other() -> None:
    lengths = {"a.py": LIMIT + 1, "b.py": LIMIT + 1}
    (problem,) = length_problems(lengths, {"a.py": "a table"})
    assert problem.startswith("b.py")


def test_an_exception_that_is_not_needed_is_reported() -> None:
    (problem,) = length_problems({"a.py": 3}, {"a.py": "a table"})
    assert "needs no exception" in problem


def test_files_git_ignores_are_not_measured(tmp_path: Path, commit_all) -> None:
    (tmp_path / ".gitignore").write_text("ignored/\n")
    (tmp_path / "ignored").mkdir()
    for name in ["ignored/a.py", "tracked.py", "gone.py"]:
        (tmp_path / name).write_text("x = 1\n" * 2)
    commit_all()
    (tmp_path / "new.py").write_text("x = 1\n")
    (tmp_path / "gone.py").unlink()
    assert measure(tmp_path) == {"tracked.py": 2, "new.py": 1}
