"""The tests marked `gpu` of every package, in several processes, and what came of them."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.bare_tree import package_folders
from tools.gpu_jobs import Job, Outcome

_MISSING = re.compile(r"No module named '([A-Za-z0-9_]+)")


def make_jobs(
    root: Path, scratch: Path, environment: Mapping[str, str], *, processes: int | None
) -> list[Job]:
    """Processes for all packages that have tests marked `gpu`.

    Only files that speak of a GPU are collected: others may need what this machine lacks.

    Args:
        root: The tree.
        scratch: Folder for the outcomes.
        environment: Of the processes.
        processes: For each package; if None, one for each core between them, because it is
            compiling kernels that takes the time.
    """
    files = {package.name: _files(root, package) for package in package_folders(root)}
    files = {name: found for name, found in files.items() if found}
    count = processes or max(1, (os.cpu_count() or 1) // max(1, len(files)))
    jobs: list[Job] = []
    for package, paths in files.items():
        for share in range(count):
            command = [
                *(sys.executable, "-m", "pytest", *paths, "-m", "gpu", "-q", "-rN", "--no-header"),
                *("-p", "no:cacheprovider", "-p", "tools.pytest_record"),
                f"--record={record_path(scratch, package, share)}",
                *(f"--share={share}/{count}", "--continue-on-collection-errors"),
                # Warnings are errors where versions are pinned. Here PyTorch is whatever there is,
                # and what it deprecates is reported and no failure.
                *("--override-ini=filterwarnings=default", "--disable-warnings", "--tb=line"),
            ]
            jobs.append(Job(f"{package} {share + 1}/{count}", command, environment, root))
    return jobs


def _files(root: Path, package: Path) -> list[str]:
    return [
        str(path.relative_to(root))
        for path in sorted((package / "tests").rglob("test_*.py"))
        if re.search(r"\bgpu\b", path.read_text(encoding="utf-8"))
    ]


def record_path(scratch: Path, package: str, share: int) -> Path:
    """Where a process writes its outcomes."""
    return scratch / f"tests-{package}-{share}.jsonl"


def summarize(root: Path, scratch: Path) -> dict[str, dict[str, Any]]:
    """Per package: how many tests passed, and by name which did not."""
    packages: dict[str, dict[str, Any]] = {}
    for package in package_folders(root):
        records: list[dict[str, Any]] = []
        for path in sorted(scratch.glob(f"tests-{package.name}-*.jsonl")):
            records += _read(path)
        packages[package.name] = _summary(records, {p.name for p in package_folders(root)})
    return packages


def problems(packages: dict[str, dict[str, Any]], outcomes: Sequence[Outcome]) -> list[str]:
    """One sentence per test that failed, was cut off or could not be collected."""
    found: list[str] = []
    for name, summary in packages.items():
        for kind in ("failed", "cut_off", "not_collected"):
            for test, message in summary[kind].items():
                found.append(f"{name}: {kind.replace('_', ' ')}: {test}: {message}")
        if summary["not_reached"]:
            found.append(f"{name}: {summary['not_reached']} tests were not reached")
    for outcome in outcomes:
        # 1 is for failed tests and uncollected files, which are named above; 5: no test selected.
        if outcome.exit_code not in (0, 1, 5) and (problem := outcome.problem):
            found.append(problem)
    explained = any(s["failed"] or s["not_collected"] or s["missing"] for s in packages.values())
    if not explained:
        found += [
            str(outcome.problem)
            for outcome in outcomes
            if outcome.exit_code == 1 and outcome.problem
        ]
    return found


def _summary(records: list[dict[str, Any]], own: set[str]) -> dict[str, Any]:
    selected = sum(r["count"] for r in records if r["event"] == "selected")
    outcomes = {r["test"]: r for r in records if r["event"] == "outcome"}
    # The last outcome counts: what fails while tearing down has passed before.
    failed = {test: r["message"] for test, r in outcomes.items() if r["outcome"] == "failed"}
    started = {r["test"] for r in records if r["event"] == "started"}
    cut_off = dict.fromkeys(sorted(started - set(outcomes)), "was running at the end")
    missing: dict[str, str] = {}
    not_collected: dict[str, str] = {}
    for record in records:
        if record["event"] == "uncollected":
            match = _MISSING.search(record["message"])
            absent = match is not None and match[1].replace("_", "-") not in own
            (missing if absent else not_collected)[record["test"]] = record["message"]
    slowest = sorted(outcomes.values(), key=lambda r: -r["seconds"])[:5]
    return {
        "passed": sum(r["outcome"] == "passed" for r in outcomes.values()),
        "skipped": sum(r["outcome"] == "skipped" for r in outcomes.values()),
        "failed": failed,
        "cut_off": cut_off,
        "not_reached": selected - len(started | set(outcomes)),
        "not_collected": not_collected,
        "missing": missing,
        "details": {test: r["detail"] for test, r in outcomes.items() if r["detail"]},
        "slowest_s": {r["test"]: r["seconds"] for r in slowest},
        "warnings": sorted({r["message"] for r in records if r["event"] == "warning"}),
    }


def _read(path: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # the process was killed, or is, in the middle of a line
    return records
