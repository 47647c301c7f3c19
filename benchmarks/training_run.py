"""The default `dilated train`, as a user runs it: wall time, bits per byte, effect of context.

`python benchmarks/training_run.py` writes results/training_run.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import write_result

RESULT = Path(__file__).parent / "results" / "training_run.json"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dilated_models", "train", "--out", f"{folder}/run"]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        records = [
            json.loads(line)
            for line in Path(folder, "run", "metrics.jsonl").read_text("utf-8").splitlines()
        ]
        config = json.loads(Path(folder, "run", "config.json").read_text(encoding="utf-8"))
    steps = [r for r in records if r["kind"] == "step"]
    validations = [r for r in records if r["kind"] == "validation"]
    (final,) = (r for r in records if r["kind"] == "final")
    row = {
        "seconds": round(seconds, 1),
        "steps": len(steps),
        "tokens_per_second": round(
            sum(s["num_tokens"] for s in steps) / sum(s["seconds"] for s in steps)
        ),
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in steps),
        "validation": [[v["step"], round(v["bits_per_byte"], 4)] for v in validations],
        "final_bits_per_byte": round(final["evaluation"]["bits_per_byte"], 4),
        "final_bytes": final["evaluation"]["num_bytes"],
        "gain": final["gain"],
        "xz_bits_per_byte": round(final["xz_bits_per_byte"], 4),
        "model": config["model"],
        "training": config["training"],
    }
    write_result(RESULT, "training_run", [row])


if __name__ == "__main__":
    main()
