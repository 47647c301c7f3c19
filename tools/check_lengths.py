"""No Python file is longer than 400 lines: longer ones are split where the subject changes."""

import subprocess
from pathlib import Path

from tools.packages import ROOT
from tools.report import report

LIMIT = 400
EXCEPTIONS: dict[str, str] = {}
"""Path to the reason why the file may be longer."""


def length_problems(lengths: dict[str, int], exceptions: dict[str, str]) -> list[str]:
    """One sentence per file over the limit, and per exception that is no longer one."""
    problems = [
        f"{path} has {lines} lines, the limit is {LIMIT}: split it, or give a reason in "
        "tools/check_lengths.py"
        for path, lines in lengths.items()
        if lines > LIMIT and path not in exceptions
    ]
    problems += [
        f"{path} needs no exception any more: remove it from tools/check_lengths.py"
        for path in exceptions
        if lengths.get(path, 0) <= LIMIT
    ]
    return problems


def measure(root: Path) -> dict[str, int]:
    """Lines of every Python file that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    return {
        path: len((root / path).read_text(encoding="utf-8").splitlines())
        for path in sorted(set(listed))
        if (root / path).is_file()  # git still lists a file that was deleted but not committed
    }


def main() -> int:
    """Check this workspace."""
    lengths = measure(ROOT)
    return report(
        length_problems(lengths, EXCEPTIONS), good=f"{len(lengths)} files of at most {LIMIT} lines"
    )


if __name__ == "__main__":
    raise SystemExit(main())
