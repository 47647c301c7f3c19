"""Record runs without copies, which `dilated train` shows beside a run of the same size.

`python benchmarks/plain_training.py RUN RUN RUN` reads the folders of runs with
`--warm-up-copies 0` that differ in `--seed` only, and writes the median of their contextwise losses
into dilated_models.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

RECORD = (
    Path(__file__).parents[1]
    / "packages/dilated-models/src/dilated_models/training/plain_training.json"
)


def main(folders: list[Path]) -> None:
    runs: list[list[dict[str, float]]] = []
    for folder in folders:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        if config["training"]["warmup_copies"] or config["text"]["paths"] is not None:
            raise SystemExit(f"{folder} is no run on plain text of the standard library alone")
        last = (folder / "metrics.jsonl").read_text("utf-8").splitlines()[-1]
        runs.append(json.loads(last)["gain"]["contextwise"]["by_context"])
    by_context = [
        {
            "context": rows[0]["context"],
            "bits_per_byte": round(statistics.median(row["bits_per_byte"] for row in rows), 4),
        }
        for rows in zip(*runs, strict=True)
    ]
    numbers = {name: config["training"][name] for name in ("steps", "batch_size", "seq_len")}
    record = {"model": config["model"], "training": numbers, "by_context": by_context}
    RECORD.write_text(json.dumps([record], indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
