"""Run the benchmarks of this machine's CPU one after another: `python benchmarks/run.py --help`.

Each writes its result, with the machine, versions and commit, to results/ and prints its progress;
`compare.py HEAD benchmarks/results` then compares it with what is committed. One that fails does
not stop the others. `--quick` runs those that measure the attention calls, on 16,384 positions, in
less than ten minutes on two cores that nobody else uses. What needs a checkout of other code or a
GPU runs by its own script.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
RUNS = FOLDER.parent / "runs" / "benchmarks"  # trained models, which two benchmarks score
COMMANDS = {
    "length": ["length.py"],
    "equal_flops_float32": ["equal_flops.py", "--dtype", "float32"],
    "equal_flops_bfloat16": ["equal_flops.py", "--dtype", "bfloat16"],
    "breakdown": ["breakdown.py"],
    "short_sequences": ["short_sequences.py"],
    "generation": ["generation.py"],
    "block_sparse": ["block_sparse.py"],
    "adaptive_speed": ["block_sparse.py", "--adaptive"],
    "hilbert": ["hilbert.py"],
    "ring": ["ring.py"],
    "chunked_loss": ["chunked_loss.py"],
    "plan_check": ["plan_check.py"],
    "streaming": ["streaming.py"],
    "slides": ["slides.py"],
    "border_copies": ["border_copies.py"],
    "adaptive_retrieval": ["adaptive_retrieval.py"],
    "longnet_paper": ["reproduce_longnet.py"],
    "soak": ["soak.py"],
    "training_run": ["training_run.py"],
    "context_gain": ["context_gain.py"],
    "adaptive_recall": ["adaptive_recall.py", str(RUNS / "copies-0")],
}
QUICK = {
    "length": [],
    "equal_flops_float32": ["--seq-len", "16384", "--seconds", "5"],
    # Half precision takes several times as long on most CPUs.
    "equal_flops_bfloat16": ["--seq-len", "16384", "--seconds", "5", "--w0", "128", "512"],
    "breakdown": [],
    "short_sequences": [],
    "generation": [],
}
# Their numbers do not depend on the number of threads, or one gives the steadiest times.
ONE_THREAD = {
    "generation",
    "block_sparse",
    "adaptive_speed",
    "hilbert",
    "plan_check",
    "border_copies",
    "adaptive_retrieval",
    "longnet_paper",
    "context_gain",
    "adaptive_recall",
}
# What `dilated train` is given for each model that context_gain.py and adaptive_recall.py score.
TRAINED = {
    **{f"copies-{seed}": ["--seed", str(seed)] for seed in range(3)},
    **{f"plain-{seed}": ["--seed", str(seed), "--warm-up-copies", "0"] for seed in range(3)},
    "border-0": ["--seed", "0", "--segment-lengths", "512,1024", "--dilation-rates", "1,4"],
}
NEEDED = {"context_gain": list(TRAINED), "adaptive_recall": ["copies-0"]}


def commands(name: str, *, quick: bool) -> list[list[str]]:
    """The commands of one benchmark: trainings that have no model yet, then its script."""
    train = [sys.executable, "-m", "dilated_models", "train"]
    script, *arguments = COMMANDS[name] + (QUICK[name] if quick else [])
    if name == "context_gain":
        arguments = [str(RUNS / run) for run in TRAINED]
    return [
        *(
            [*train, *TRAINED[run], "--out", str(RUNS / run)]
            for run in NEEDED.get(name, [])
            if not (RUNS / run / "model.safetensors").exists()
        ),
        [sys.executable, str(FOLDER / script), *arguments],
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmarks that the command line names; 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than ten minutes for all")
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=[])
    options = parser.parse_args(arguments)
    failed: list[str] = []
    for name in options.only or (QUICK if options.quick else COMMANDS):
        # Threads that wait for each other must not keep a core from them, if other jobs run here.
        environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
        if name in ONE_THREAD:
            environment["OMP_NUM_THREADS"] = "1"
        start = time.monotonic()
        for command in commands(name, quick=options.quick and name in QUICK):
            print(f"{name}: {' '.join(command[1:])}", flush=True)
            if subprocess.run(command, env=environment).returncode:
                failed.append(name)
                break
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
