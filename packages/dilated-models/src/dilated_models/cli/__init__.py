"""The `dilated` command."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line; the `dilated` script calls this.

    Exit codes: 0 done; 1 the run failed, or nobody reads its output; 2 an option, a file, the disk
    or the memory does not do; 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP. After an
    error one line on stderr gives the reason.
    """
    # OpenMP's threads spin while they wait for one another. If another process is busy, a spinning
    # thread keeps the core that its partner needs, and steps take several times as long. OpenMP
    # reads this variable once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = _run(sys.argv[1:])
    except KeyboardInterrupt:  # while modules are imported; commands have a line of their own
        print("dilated: stopped by Ctrl-C", file=sys.stderr)
        code = 130
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    try:
        from dilated_models.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"typer", "rich", "click"}:
            raise
        print(
            f"dilated: {error.name} is not installed; the command line needs the extra cli: "
            f"pip install 'dilated-models[cli]'",
            file=sys.stderr,
        )
        return 2
    return run(arguments)
