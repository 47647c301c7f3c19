"""Train again and again while processes are killed, stopped and denied disk; compare the bits.

`python benchmarks/soak.py --minutes 60` writes results/soak.json. Every round is a run of two
processes under torchrun, by DDP, FSDP2 or context parallelism in turn. Faults hit it at random
steps, torchrun starts it again, and at its end weights and losses must equal, bit for bit, those of
a run of the same kind that nothing disturbed. Linux only: faults go through signals and limits.

- kill: SIGKILL to one rank.
- hang: SIGSTOP to one rank; another rank must name it.
- disk full: rank 0 can write no file any longer.
- stop: SIGTERM to torchrun, as a scheduler sends it; the run is continued with --resume.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import write_result
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

RESULT = Path(__file__).parent / "results" / "soak.json"
KINDS = {"DDP": [], "FSDP2": ["--fsdp"], "context parallel": ["--cp", "2"]}
FAULTS: list[str] = ["kill", "hang", "disk full", "stop"]
PROCESSES, STEPS, FAULTS_A_ROUND = 2, 60, 2
HANG_S = 20  # what another rank waits for one that hangs
TRAIN = [
    *("--steps", str(STEPS), "--batch-size", "4", "--seq-len", "128", "--first-seq-len", "128"),
    *("--layers", "2", "--d-model", "32", "--heads", "2", "--feed-forward", "64"),
    *("--segment-lengths", "32,128", "--dilation-rates", "1,4", "--checkpoint-every", "4"),
    *("--validate-every", "1000", "--validation-tokens", "512"),
    *("--final-validation-tokens", "512", "--device", "cpu", "--timeout", str(HANG_S)),
]


class Job:
    """One run under torchrun, and what it has printed."""

    def __init__(self, folder: Path, text: Path, options: list[str]) -> None:
        self.folder, self.text, self.options = folder, text, options
        self.log = folder.with_suffix(".log")
        self.process = self._start("--text", str(text), *TRAIN)

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={PROCESSES}", "--max-restarts=100"]
        command = [*launcher, "-m", "dilated_models.train", "--out", str(self.folder), *arguments]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [*command, *self.options], stdout=log, stderr=log, env=os.environ | THREADS
            )

    def resume(self) -> None:
        """Continue the run after its processes have ended."""
        self.process = self._start("--resume", "--timeout", str(HANG_S))

    def is_running(self) -> bool:
        """Whether torchrun has not ended."""
        return self.process.poll() is None

    def step(self) -> int:
        """The last step that was recorded; 0 before the first."""
        steps = self.steps()
        return steps[-1]["step"] if steps else 0

    def steps(self) -> list[dict[str, Any]]:
        """The records of steps, without what depends on the time."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        rows: list[dict[str, Any]] = []
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # being written
                break
            if row["kind"] == "step":
                rows.append({name: row[name] for name in ("step", "loss", "gradient_norm")})
        return rows

    def ranks(self) -> dict[int, int]:
        """Process of each rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        found: dict[int, int] = {}
        try:
            for pid in children.read_text().split():
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    if entry.startswith(b"RANK="):
                        found[int(entry[5:])] = int(pid)
        except OSError:  # a process has just ended
            return {}
        return found

    def weights(self) -> str:
        """SHA-256 of the saved weights; the file also holds the identity of its run."""
        digest = hashlib.sha256()
        for name, weight in sorted(load_file(self.folder / "model.safetensors").items()):
            digest.update(name.encode() + weight.numpy().tobytes())
        return digest.hexdigest()


THREADS = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def inject(job: Job, fault: str, rng: random.Random) -> dict[str, Any] | None:
    """Let a fault hit the job; what was done, or None if its processes were just ending."""
    ranks = job.ranks()
    if len(ranks) < PROCESSES:
        return None
    rank = 0 if fault == "disk full" else rng.randrange(PROCESSES)
    event: dict[str, Any] = {
        "fault": fault,
        "rank": None if fault == "stop" else rank,
        "step": job.step(),
    }
    printed = job.log.stat().st_size
    started = time.monotonic()
    try:
        if fault == "kill":
            os.kill(ranks[rank], signal.SIGKILL)
        elif fault == "hang":
            os.kill(ranks[rank], signal.SIGSTOP)
        elif fault == "disk full":
            hard = resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE)[1]
            resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (0, hard))
        else:
            job.process.send_signal(signal.SIGTERM)
            job.process.wait(120)
            job.resume()
    except ProcessLookupError:
        return None
    while job.is_running() and set(ranks.values()) & set(job.ranks().values()):
        if time.monotonic() - started > 300:
            raise RuntimeError(f"{event} left processes that did not end; see {job.log}.")
        time.sleep(0.2)
    event["seconds_to_end"] = round(time.monotonic() - started, 1)
    if fault == "hang":
        text = job.log.read_bytes()[printed:].decode(errors="replace")
        event["named"] = f"rank {rank} does not answer" in text or f"rank {rank} failed" in text
    return event


def run_round(folder: Path, text: Path, kind: str, faults: list[str], seed: int) -> dict[str, Any]:
    """One run that the faults hit; its events, its bits, and how it ended."""
    rng = random.Random(seed)
    job = Job(folder, text, KINDS[kind])
    started, events = time.monotonic(), list[dict[str, Any]]()
    for fault in faults:
        goal = job.step() + rng.randrange(1, STEPS // (len(faults) + 1))
        while job.is_running() and job.step() < min(goal, STEPS - 2):
            time.sleep(0.1)
        if not job.is_running():
            break
        time.sleep(rng.random())
        if (event := inject(job, fault, rng)) is not None:
            events.append(event)
    code = job.process.wait(900)
    return {
        "kind": kind,
        "events": events,
        "code": code,
        "steps": job.steps(),
        "weights": job.weights() if code == 0 else None,
        "seconds": round(time.monotonic() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        scratch = Path(name)
        text = scratch / "text.txt"
        text.write_bytes(b"".join(b"%d squared is %d.\n" % (i, i * i) for i in range(20_000)))
        undisturbed = {
            kind: run_round(scratch / kind.replace(" ", "_"), text, kind, [], 0) for kind in KINDS
        }
        for kind, found in undisturbed.items():
            if found["code"] or len(found["steps"]) != STEPS:
                raise RuntimeError(f"the undisturbed run by {kind} ended with {found['code']}.")
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline:
            i = len(rows)
            kind = list(KINDS)[i % len(KINDS)]
            if not left:
                left = rng.sample(FAULTS, len(FAULTS))  # each fault as often as the others
            faults, left = left[:FAULTS_A_ROUND], left[FAULTS_A_ROUND:]
            folder = scratch / f"round_{i}"
            found = run_round(folder, text, kind, faults, options.seed * 100_000 + i)
            expected = undisturbed[kind]
            row = {
                "round": i,
                "kind": kind,
                "processes": PROCESSES,
                "num_steps": STEPS,
                "events": found["events"],
                "code": found["code"],
                "seconds": found["seconds"],
                "same_weights": found["weights"] == expected["weights"],
                "same_losses": found["steps"] == expected["steps"],
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            write_result(options.out, "soak", rows)
            if row["same_weights"] and row["same_losses"]:
                shutil.rmtree(folder)
            else:
                print(folder.with_suffix(".log").read_text(errors="replace")[-4000:], flush=True)


if __name__ == "__main__":
    main()
