"""Check and measure the packages on a GPU, from the bare source tree: `python tools/gpu_check.py`.

Nothing of ours has to be installed and no network is used; PyTorch, Triton, pytest and hypothesis
must be there. In this order, each in processes of its own with a limit of time:

- environment: GPU, driver, versions, and the rates that the machine can reach;
- tests: every package's tests marked `gpu`;
- accuracy: every backend against float64 on sequences up to four million positions;
- sanitizer (only with --sanitizer): the fused kernels under compute-sanitizer;
- benchmark: the table of benchmarks/gpu_attention.py.

Exit code 0 if all results are right, 1 if not (or not all could be looked at), 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # of a script, Python puts only its own folder on the path

from tools import gpu_tests  # noqa: E402
from tools.bare_tree import bare_environment, write_metadata  # noqa: E402
from tools.gpu_jobs import Job, Outcome, run_jobs  # noqa: E402
from tools.gpu_summary import summary_lines  # noqa: E402

FORMAT = 1
# How the phases share the time that is left when they start.
WEIGHTS = {"environment": 1.5, "tests": 5.0, "accuracy": 2.0, "sanitizer": 3.0, "benchmark": 4.0}
# Loading PyTorch from a cold disk takes long, and without this phase there is no other.
MIN_ENVIRONMENT_S = 30.0
# A benchmark row that has started may end: so much before its limit none is started.
LAST_ROW_S = 20.0
RESULTS = ROOT / "benchmarks" / "results" / "gpu_attention.json"
# Backends are ours to be right; of PyTorch's kernels a failure is a fact about the machine.
PEERS = ("dense_", "windows_", "square_", "gather_")

Phase = dict[str, Any]


@dataclass
class Run:
    """One run of the command: its options, and the report as far as it has come."""

    options: argparse.Namespace
    scratch: Path
    environment: dict[str, str]
    report: dict[str, Any] = field(default_factory=dict[str, Any])
    start: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def show(self, line: str) -> None:
        """Print a line of progress."""
        print(f"[{self.elapsed():6.1f}s] {line}", flush=True)

    def save(self) -> None:
        """Write the report in one step, so that a run that is stopped leaves a whole file."""
        self.report["seconds"] = round(self.elapsed(), 1)
        _write(self.options.json, self.report)

    def script(self, name: str, part: Path, *arguments: str) -> Job:
        """A script of benchmarks/ that writes its result to `part`."""
        command = [sys.executable, "-u", str(ROOT / "benchmarks" / name), *arguments]
        command += [f"--device={self.options.device}", f"--json={part}"]
        return Job(name.removesuffix(".py"), command, self.environment, ROOT)

    def run(
        self, jobs: Sequence[Job], seconds: float, progress: Callable[[], None]
    ) -> list[Outcome]:
        """Run jobs, with `progress` bringing the report up to date meanwhile."""

        def each_tick() -> None:
            progress()
            self.save()

        return run_jobs(jobs, seconds=seconds, show=self.show, each_tick=each_tick)


def run_script(
    run: Run, phase: Phase, name: str, seconds: float, *arguments: str, processes: int = 1
) -> None:
    """A phase that is one script: its rows come into the report as they are written.

    With several processes each is told `--share=I/N`.
    """
    parts = [run.scratch / f"{name}.{i}.json" for i in range(processes)]
    jobs = [
        run.script(name, part, *arguments, *([f"--share={i}/{processes}"] * (processes > 1)))
        for i, part in enumerate(parts)
    ]

    def progress() -> None:
        results = [json.loads(part.read_text(encoding="utf-8")) for part in parts if part.exists()]
        rows = [row for result in results for row in result.get("rows", [])]
        for result in results:
            phase.update(result)
        phase["rows"] = rows
        phase["complete"] = sum(result.get("complete", False) for result in results) == processes

    for outcome in run.run(jobs, seconds, progress):
        if problem := outcome.problem:
            phase["problems"].append(problem)
            phase["tail"] = list(outcome.tail)
    if not phase.pop("complete") and not phase["problems"]:
        phase["problems"].append(f"{name} ended before its work was done")


def check_environment(run: Run, phase: Phase, seconds: float) -> None:
    """Where this runs."""
    commit = [f"--commit={run.options.commit}"] if run.options.commit else []
    run_script(run, phase, "gpu_machine.py", seconds, *commit)
    run.report["environment"] = phase.pop("environment", None)


def check_tests(run: Run, phase: Phase, seconds: float) -> None:
    """Every package's tests marked `gpu`."""
    jobs = gpu_tests.make_jobs(ROOT, run.scratch, run.environment, processes=run.options.processes)

    def progress() -> None:
        phase["packages"] = gpu_tests.summarize(ROOT, run.scratch)

    outcomes = run.run(jobs, seconds, progress)
    phase["problems"] += gpu_tests.problems(phase["packages"], outcomes)
    passed = sum(package["passed"] for package in phase["packages"].values())
    if run.options.device == "cuda" and not passed:
        phase["problems"].append("no test passed, so nothing is known to be right")


def check_accuracy(run: Run, phase: Phase, seconds: float) -> None:
    """Every backend on long sequences."""
    quick = ["--quick"] if run.options.quick else []
    # Compiling takes the time; one share is for the sequences that need most of the memory.
    count = run.options.processes or max(1, min(6, (os.cpu_count() or 1) // 2))
    run_script(run, phase, "gpu_accuracy.py", seconds, *quick, processes=count)
    for row in phase["rows"]:
        for problem in row.get("problems", []):
            phase["problems"].append(f"backend {row['backend']!r}, {row['case']}: {problem}")
    if not any("errors" in row for row in phase["rows"]):
        phase["problems"].append("no backend was compared with anything")


def check_sanitizer(run: Run, phase: Phase, seconds: float) -> None:
    """The fused kernels under compute-sanitizer: memory accesses, and races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        phase["problems"].append("compute-sanitizer is not on the PATH")
        return
    # With PyTorch's own pool of memory a stray access would hit memory that is allocated.
    environment = {**run.environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for check in ("memcheck", "racecheck"):
        job = run.script("gpu_accuracy.py", run.scratch / f"{check}.json", "--tiny")
        command = [tool, "--tool", check, "--error-exitcode", "99", *job.command]
        job = Job(check, command, environment, ROOT)
        (outcome,) = run.run([job], seconds / 2, lambda: None)
        phase[check] = {"exit_code": outcome.exit_code, "tail": list(outcome.tail)}
        if problem := outcome.problem:
            phase["problems"].append(problem)


def run_benchmark(run: Run, phase: Phase, seconds: float) -> None:
    """The table; a backend whose result is wrong is named and not timed."""
    arguments = [f"--seconds={max(0.0, seconds - LAST_ROW_S)}"]
    arguments += ["--quick"] if run.options.quick else []
    arguments += [f"--commit={run.options.commit}"] if run.options.commit else []
    run_script(run, phase, "gpu_attention.py", seconds, *arguments)
    for row in phase["rows"]:
        for name, contender in row["contenders"].items():
            if "failed" in contender and not name.startswith(PEERS):
                where = f"S={row['seq_len']} w0={row['w0']}"
                phase["problems"].append(f"backend {name!r}, {where}: {contender['failed']}")
    part = run.scratch / "gpu_attention.py.0.json"
    if run.options.out is not None and part.exists():
        _write(run.options.out, json.loads(part.read_text(encoding="utf-8")))


PHASES: dict[str, Callable[[Run, Phase, float], None]] = {
    "environment": check_environment,
    "tests": check_tests,
    "accuracy": check_accuracy,
    "sanitizer": check_sanitizer,
    "benchmark": run_benchmark,
}


def run_phases(run: Run) -> int:
    """All phases that were asked for; a phase that fails does not keep the others from running."""
    options = run.options
    wanted = ["environment", *(name for name in PHASES if name in options.only)]
    phases: dict[str, Phase] = {}
    run.report |= {
        "gpu_check": FORMAT,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": options.device,
        "environment": None,
        "phases": phases,
        "is_complete": False,
    }
    for i, name in enumerate(wanted):
        left = options.seconds - run.elapsed()
        seconds = left * WEIGHTS[name] / sum(WEIGHTS[other] for other in wanted[i:])
        if name == "environment":
            seconds = max(seconds, MIN_ENVIRONMENT_S)
        phase: Phase = {"limit_s": round(seconds, 1), "problems": []}
        phases[name] = phase
        run.show(f"--- {name}, at most {seconds:.0f} s")
        begin = run.elapsed()
        PHASES[name](run, phase, seconds)
        phase["seconds"] = round(run.elapsed() - begin, 1)
        for problem in phase["problems"]:
            run.show(f"{name}: PROBLEM: {problem}")
        if not phase["problems"] and run.report["environment"] is None:
            print("no CUDA device is visible to PyTorch; --device cpu runs tiny shapes without one")
            return 2
        run.save()
    correct = not any(phase["problems"] for phase in phases.values())
    run.report |= {"is_complete": True, "is_correct": correct}
    run.save()
    print("\n".join(summary_lines(run.report)))
    print(f"report: {options.json}")
    return 0 if correct else 1


def tune(run: Run, arguments: Sequence[str]) -> int:
    """Hand over to benchmarks/gpu_tuning.py, with the packages on its path."""
    options = run.options
    part = options.json
    job = run.script("gpu_tuning.py", part, f"--seconds={options.seconds}", *arguments)
    (outcome,) = run_jobs(
        [job], seconds=options.seconds + 60, show=run.show, each_tick=lambda: None
    )
    print(outcome.problem or f"report: {part}")
    return 1 if outcome.problem else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name in PHASES if name != "environment"]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PHASE", help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--sanitizer", action="store_true", help="also run compute-sanitizer")
    parser.add_argument("--seconds", type=float, default=465, help="time for everything")
    parser.add_argument("--json", type=Path, help="report; runs/gpu_check.json if not given")
    parser.add_argument("--out", type=Path, help=f"for the benchmark; on a GPU {RESULTS.name}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="what to record where there is no git repository")
    parser.add_argument(
        "--processes", type=int, help="for the tests of each package, and for accuracy"
    )
    parser.add_argument(
        "--tune", nargs=argparse.REMAINDER, help="only search tile sizes; what follows is for that"
    )
    options = parser.parse_args(arguments)
    if options.only is None:
        options.only = [name for name in names if name != "sanitizer" or options.sanitizer]
    elif options.sanitizer:
        options.only.append("sanitizer")
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
        environment["PYTHONUNBUFFERED"] = "1"
        environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(scratch / "hypothesis")
        if options.device == "cpu":
            # The kernels are interpreted; nothing must find a GPU that happens to be there.
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        run = Run(options, scratch, environment)
        if options.tune is not None:
            return tune(run, options.tune)
        return run_phases(run)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


if __name__ == "__main__":
    raise SystemExit(main())
