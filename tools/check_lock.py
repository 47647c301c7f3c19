"""requirements.lock is what this workspace resolves to; `--write` makes it so.

uv.lock is not committed because it names the index that made it. This file is its export for
every package, extra and group but vendors' kernels: exact versions and hashes, no addresses. The
workspace is resolved in an empty folder, as in a fresh clone, because an older uv.lock in the tree
would keep versions that nobody else gets.
"""

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

from tools.packages import ROOT
from tools.report import report

LOCK = "requirements.lock"
WRITE = "run `uv run python -m tools.check_lock --write`"


def resolve(root: Path) -> str:
    """The text requirements.lock should have."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for path in [root / "pyproject.toml", *root.glob("packages/*/pyproject.toml")]:
            target = copy / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        command = "uv export --quiet --no-header --no-emit-workspace"
        command += " --all-packages --all-extras --all-groups"
        projects = [path.read_text() for path in copy.glob("packages/*/pyproject.toml")]
        # Built for one PyTorch, so that nobody could install the record with them in it.
        for extra in ("flash", "xformers"):
            if any(f"\n{extra} = [" in text for text in projects):
                command += f" --no-extra {extra}"
        return subprocess.run(
            command.split(), cwd=copy, check=True, stdout=subprocess.PIPE, text=True
        ).stdout


def lock_problems(committed: str | None, resolved: str) -> list[str]:
    """At most one sentence: what is wrong with the committed text."""
    if committed is None:
        return [f"{LOCK} is missing; {WRITE}"]
    if "://" in committed:
        line = next(line for line in committed.splitlines() if "://" in line)
        return [f"{LOCK} contains an address ({line.strip()}); {WRITE}"]
    if committed != resolved:
        difference = set(resolved.splitlines()) ^ set(committed.splitlines())
        example = min(difference, default="the order").strip(" \\")
        return [f"{LOCK} is out of date, for example at {example!r}; {WRITE}"]
    return []


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Check or write the lock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {LOCK}")
    write = parser.parse_args(arguments).write
    path = root / LOCK
    try:
        resolved = resolve(root)
    except subprocess.CalledProcessError as error:  # uv has printed why
        return report([f"uv could not resolve the workspace (exit {error.returncode})"])
    if write:
        path.write_text(resolved, encoding="utf-8")
    committed = path.read_text(encoding="utf-8") if path.exists() else None
    return report(lock_problems(committed, resolved), good=f"{LOCK} is current")


if __name__ == "__main__":
    raise SystemExit(main())
