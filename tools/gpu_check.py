"""Check and measure the packages on a GPU, from the bare source tree: `python tools/gpu_check.py`.

Nothing of ours has to be installed and no network is used; PyTorch, Triton, einops, pytest,
pytest-xdist, pytest-timeout and hypothesis must be there. In this order:

- environment: GPU, versions, and the rates that the machine can reach;
- tests: every package's tests marked `gpu`, accuracy on sequences of four million positions
  among them; with --sanitizer the small ones under compute-sanitizer, too;
- benchmark: the table of benchmarks/gpu_attention.py, and the verdict on each goal;
- blocks: block-sparse attention by each backend, from benchmarks/gpu_block_sparse.py.

With --device cpu it runs the same phases on tiny shapes, without a GPU. Exit code 0 if all
results are right, 1 if not (or not all could be checked), 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # of a script, Python puts only its own folder on the path

from tools.bare_tree import bare_environment, package_folders, write_metadata  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "gpu_attention.json"
# The script of each phase that times something; its result is written beside RESULTS.
SCRIPTS = {"benchmark": "gpu_attention.py", "blocks": "gpu_block_sparse.py"}
ACCURACY = "packages/dilated-kernels/tests/fused/test_accuracy.py"
# Backends are ours to be right; of PyTorch's kernels a failure is a fact about the machine.
PEERS = ("dense_", "windows_", "gather_")
# Loading PyTorch from a cold disk takes long.
ENVIRONMENT_S = 90.0
TEST_TIMEOUT_S = 180.0
# A row of the benchmark that has started may end; a session of tests writes its results.
GRACE_S = 20.0

Report = dict[str, Any]


def run(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> str:
    """Run a command, its output shown as it comes; kill it and its children after `seconds`.

    Returns:
        The problem with it, in one sentence; "" if it ended well.
    """
    print(f"--- {' '.join(command)[:200]} (at most {seconds:.0f} s)", flush=True)
    name = next((Path(word).name for word in command if word.endswith(".py")), command[0])
    process = subprocess.Popen(command, cwd=ROOT, env=dict(environment), process_group=0)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        return f"{name} was stopped after {seconds:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return f"{name} ended with code {code}" if code else ""


def script(name: str, part: Path, *arguments: str) -> list[str]:
    """A script of benchmarks/ that writes its result to `part`."""
    return [sys.executable, str(ROOT / "benchmarks" / name), f"--json={part}", *arguments]


def run_tests(
    options: argparse.Namespace, scratch: Path, environment: Mapping[str, str], seconds: float
) -> Report:
    """Every package's tests marked `gpu`, in several processes: compiling takes the time."""
    sessions = [([ACCURACY], "not gpu", options.processes)]
    if options.device == "cuda":
        # One worker, not none: a kernel that ends its process must not end the session.
        sessions = [
            (find_tests("gpu"), "gpu and not large", options.processes),
            (find_tests("large"), "gpu and large", 1),
        ]
        sessions = [session for session in sessions if session[0]]
    report: Report = {"passed": 0, "skipped": {}, "errors": {}, "problems": []}
    for i, (files, selected, processes) in enumerate(sessions):
        results = scratch / f"tests.{i}.xml"
        limit = seconds / len(sessions)
        command = [
            *(sys.executable, "-m", "pytest", *files, "-m", selected, "-n", str(processes)),
            *("-q", "-rN", "--no-header", "--tb=short", f"--junitxml={results}"),
            # By thread: a kernel that hangs leaves no chance for a signal, and costs its process.
            *(f"--timeout={min(TEST_TIMEOUT_S, limit / 3):.0f}", "--timeout-method=thread"),
            f"--session-timeout={max(limit / 2, limit - GRACE_S):.0f}",
            *("-p", "no:cacheprovider", "--continue-on-collection-errors"),
            # Warnings are errors where versions are pinned. Here PyTorch is whatever there is.
            *("--override-ini=filterwarnings=default", "--disable-warnings"),
        ]
        problem = run(command, environment, limit)
        num_problems = len(report["problems"])
        read_tests(results, report)
        # 1 is for failed tests, which are problems of their own; 5: no test was selected.
        if problem and (len(report["problems"]) == num_problems and not problem.endswith("code 5")):
            report["problems"].append(problem)
    if not report["passed"]:
        report["problems"].append("no test passed, so nothing is known to be right")
    if options.sanitizer:
        report["problems"] += run_sanitizer(environment, seconds)
    return report


def find_tests(marker: str) -> list[str]:
    """Files that mention a marker; others need not be collected, and may need what is not here."""
    return [
        str(path.relative_to(ROOT))
        for package in package_folders(ROOT)
        for path in sorted((package / "tests").rglob("test_*.py"))
        if re.search(rf"\b{marker}\b", path.read_text(encoding="utf-8"))
    ]


def read_tests(path: Path, report: Report) -> None:
    """Add the outcomes in a file of `--junitxml` to the report."""
    if not path.exists():
        report["problems"].append("the tests ended without results")
        return
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if (found := case.find("properties/property[@name='errors']")) is not None:
            report["errors"][name] = found.get("value")
        bad = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = str(bad[0].get("message"))[:300] if bad else ""
        if not bad:
            report["passed"] += 1
        elif bad[0].tag == "skipped":
            report["skipped"][message] = report["skipped"].get(message, 0) + 1
        else:
            report["problems"].append(f"{name}: {message}")


def run_sanitizer(environment: Mapping[str, str], seconds: float) -> list[str]:
    """Small tests of the fused kernels under compute-sanitizer: memory accesses, and races."""
    tool = shutil.which("compute-sanitizer", path=environment.get("PATH"))
    if tool is None:
        return ["compute-sanitizer is not on the PATH"]
    # With PyTorch's own pool of memory a stray access would hit memory that is allocated.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    tests = [sys.executable, "-m", "pytest", ACCURACY, "-q", "-k", "small and triton"]
    problems: list[str] = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "99", *tests]
        if problem := run(command, environment, seconds / 2):
            problems.append(f"{check}: {problem}")
    return problems


def run_benchmark(
    phase: str,
    options: argparse.Namespace,
    scratch: Path,
    environment: Mapping[str, str],
    seconds: float,
) -> Report:
    """The table of one script; a backend whose result is wrong is named and not timed."""
    part = scratch / f"{phase}.json"
    arguments = [f"--device={options.device}", f"--seconds={max(0.0, seconds - GRACE_S)}"]
    arguments += ["--quick"] if options.quick else []
    problem = run(script(SCRIPTS[phase], part, *arguments), environment, seconds)
    report: Report = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {"rows": []}
    report["problems"] = [problem] if problem else []
    for row in report["rows"]:
        for name, contender in row["contenders"].items():
            if "failed" in contender and not name.startswith(PEERS):
                where = f"S={row['seq_len']}"
                where += f" w0={row['w0']}" if "w0" in row else ""
                report["problems"].append(f"backend {name!r}, {where}: {contender['failed']}")
    return report


def check(options: argparse.Namespace, scratch: Path, environment: Mapping[str, str]) -> int:
    """All phases of the command line; a phase that fails does not stop the others."""
    start = time.monotonic()
    part = scratch / "machine.json"
    arguments = [f"--device={options.device}"]
    arguments += [f"--commit={options.commit}"] if options.commit else []
    problem = run(script("gpu_machine.py", part, *arguments), environment, ENVIRONMENT_S)
    report: Report = {"gpu_check": 2, "environment": None, "problems": [], "is_complete": False}
    if part.exists():
        report["environment"] = json.loads(part.read_text(encoding="utf-8"))
    elif not problem:
        print("no CUDA device is visible to PyTorch; --device cpu runs tiny shapes without one")
        return 2
    problems: list[str] = report["problems"]
    problems += [problem] if problem else []
    phases = {"tests": run_tests} | {name: partial(run_benchmark, name) for name in SCRIPTS}
    for i, name in enumerate(options.only):
        left = options.seconds - (time.monotonic() - start)
        phase = phases[name](
            options, scratch, environment, max(1.0, left / (len(options.only) - i))
        )
        problems += phase.pop("problems")
        report[name] = phase
        report["seconds"] = round(time.monotonic() - start, 1)
        write_json(options.json, report)
        if name in SCRIPTS and options.out is not None and phase["rows"]:
            benchmark = SCRIPTS[name].removesuffix(".py")
            found = {"benchmark": benchmark, "environment": report["environment"]}
            beside = (
                options.out if name == "benchmark" else options.out.with_name(benchmark + ".json")
            )
            write_json(beside, found | phase)
    report |= {"is_complete": True, "is_correct": not problems}
    write_json(options.json, report)
    print("\n".join(summary(report)))
    return 1 if problems else 0


def summary(report: Report) -> list[str]:
    """What matters of a report, in few lines."""
    machine: Report = report["environment"] or {}
    lines = [
        f"{machine.get('gpu') or 'CPU'}, torch {machine.get('torch')}: {machine.get('ceilings')}"
    ]
    if tests := report.get("tests"):
        lines.append(f"tests: {tests['passed']} passed, {sum(tests['skipped'].values())} skipped")
    for goal in report.get("benchmark", {}).get("goals", []):
        lines.append(f"goal met: {goal['met']}: {goal['goal']} ({goal['evidence']})")
    lines += [f"PROBLEM: {problem[:300]}" for problem in report["problems"][:40]]
    verdict = (
        f"{len(report['problems'])} problems" if report["problems"] else "all results are right"
    )
    return [*lines, f"RESULT: {verdict}, after {report.get('seconds', 0):.0f} s"]


def write_json(path: Path, data: Report) -> None:
    """Replace the file in one step, so that a stopped run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    phases = ["tests", *SCRIPTS]
    parser.add_argument("--only", nargs="+", choices=phases, default=phases, metavar="PHASE")
    parser.add_argument("--quick", action="store_true", help="fewer rows of the benchmark")
    parser.add_argument("--sanitizer", action="store_true", help="also run compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=465, help="time for everything")
    parser.add_argument("--json", type=Path, help="report; runs/gpu_check.json if not given")
    parser.add_argument("--out", type=Path, help=f"for the benchmark; on a GPU {RESULTS.name}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="what to record where there is no git repository")
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument(
        "--tune", nargs=argparse.REMAINDER, help="only search tile sizes; what follows is for that"
    )
    options = parser.parse_args(arguments)
    if options.out is None and options.device == "cuda" and not options.quick:
        options.out = RESULTS
    name = "gpu_check.json" if options.tune is None else "gpu_tuning.json"
    options.json = (options.json or ROOT / "runs" / name).resolve()
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = parse(arguments)

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)  # so that the processes that run are ended, too

    signal.signal(signal.SIGTERM, stop)
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        scratch = Path(folder)
        write_metadata(ROOT, scratch / "metadata")
        environment = bare_environment(ROOT, scratch / "metadata")
        environment |= {"PYTHONUNBUFFERED": "1", "HYPOTHESIS_STORAGE_DIRECTORY": folder}
        if options.device == "cpu":
            # The kernels are interpreted; nothing must find a GPU that happens to be there.
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        if options.tune is not None:
            search = [f"--device={options.device}", f"--seconds={options.seconds}", *options.tune]
            command = script("gpu_tuning.py", options.json, *search)
            problem = run(command, environment, options.seconds + 60)
            print(problem or f"report: {options.json}")
            return 1 if problem else 0
        return check(options, scratch, environment)


if __name__ == "__main__":
    raise SystemExit(main())
