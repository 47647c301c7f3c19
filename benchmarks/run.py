"""Run the benchmarks of this machine's CPU one after another: `python benchmarks/run.py --help`.

Each writes its result to results/ and prints its progress. `--quick` measures the equal FLOPs at
16,384 positions only, and all of it then takes less than ten minutes on two cores that nobody else
uses. What takes longer runs by its own script: training_run.py, streaming.py, generation.py.
So does ring.py, which starts processes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
QUICK = {
    "equal_flops_float32": ["--seq-len", "16384", "--seconds", "5"],
    # Half precision takes several times as long on most CPUs.
    "equal_flops_bfloat16": ["--seq-len", "16384", "--seconds", "5", "--w0", "128", "512"],
}
COMMANDS = {
    "length": ["length.py"],
    "equal_flops_float32": ["equal_flops.py", "--dtype", "float32"],
    "equal_flops_bfloat16": ["equal_flops.py", "--dtype", "bfloat16"],
    "breakdown": ["breakdown.py"],
    "short_sequences": ["short_sequences.py"],
    "generation": ["generation.py"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than ten minutes for all")
    parser.add_argument("--only", nargs="*", choices=COMMANDS, default=[*COMMANDS])
    options = parser.parse_args()
    # Threads that wait for each other must not keep a core from them, if other jobs run here.
    environment = {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ
    for name in options.only:
        script, *arguments = COMMANDS[name]
        if options.quick:
            arguments += QUICK.get(name, [])
        print(f"{name}: {script} {' '.join(arguments)}", flush=True)
        start = time.monotonic()
        subprocess.run(
            [sys.executable, str(FOLDER / script), *arguments], check=True, env=environment
        )
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
