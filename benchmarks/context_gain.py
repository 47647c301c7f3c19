"""What trained models gain from context: the contextwise loss of finished runs, side by side.

    dilated train --seed 0 --out runs/copies-0                        # and with seeds 1 and 2
    dilated train --seed 0 --warm-up-copies 0 --out runs/plain-0      # and with seeds 1 and 2
    dilated train --seed 0 --segment-lengths 512,1024 --dilation-rates 1,4 --out runs/border-0
    python benchmarks/context_gain.py runs/copies-* runs/plain-* runs/border-0

writes results/context_gain.json. All runs are scored on the same targets of the standard library's
validation files. With --record, the median of the runs without copies also becomes the record that
`dilated train` prints beside its own loss.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from dilated_models import load_model
from dilated_models.longnet.saving import read_config
from dilated_models.text.files import split_files, standard_library_files
from dilated_models.text.streams import ByteStream
from dilated_models.training import gain as gain_module
from dilated_models.training.config import TrainingConfig
from dilated_models.training.gain import COMPARED, measure_gain
from harness import write_result

RESULT = Path(__file__).parent / "results" / "context_gain.json"
RECORD = Path(gain_module.__file__).with_name("plain_training.json")


def score(folder: Path) -> dict[str, Any]:
    """One row: the configuration of a run, and its losses by context and behind borders."""
    config = read_config(folder)
    training = TrainingConfig.from_dict(config["training"])
    pieces, skipped = standard_library_files()
    split = split_files(pieces, skipped, validation_share=training.validation_share)
    gain = measure_gain(
        load_model(folder, device="cpu"),
        ByteStream(split.validation),
        seq_len=training.seq_len,
        max_tokens=training.final_validation_tokens,
        training=ByteStream(split.train),
    )
    assert gain is not None
    return {
        "run": folder.name,
        "seed": training.seed,
        "copied_steps": training.copied_steps,
        "tokens": training.steps * training.batch_size * training.seq_len,
        "num_targets": gain.contextwise.num_targets,
        "by_context": rows(gain.contextwise.by_context),
        "predictor": rows(gain.predictor),
        "by_border": [
            {
                "nearest": row.nearest,
                "farthest": row.farthest,
                "bits_per_byte": round(row.bits_per_byte, 4),
                "copied_bits_per_byte": round(row.copied_bits_per_byte, 4),
            }
            for row in gain.contextwise.by_border
        ],
        "model": config["model"],
        "training": config["training"],
    }


def rows(losses: Any) -> list[dict[str, Any]]:
    """Losses by context as JSON types."""
    return [{"context": x.context, "bits_per_byte": round(x.bits_per_byte, 4)} for x in losses]


def plain_record(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """The median over the seeds of the runs without copies."""
    plain = [row for row in scored if not row["copied_steps"]]
    by_context = [
        {
            "context": row["context"],
            "bits_per_byte": statistics.median(
                run["by_context"][i]["bits_per_byte"] for run in plain
            ),
        }
        for i, row in enumerate(plain[0]["by_context"])
    ]
    return {
        "model": plain[0]["model"],
        "training": {name: plain[0]["training"][name] for name in COMPARED},
        "by_context": by_context,
    }


def main() -> None:
    """Score the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scored: list[dict[str, Any]] = []
    for folder in options.folders:
        scored.append(score(folder))
        print(folder, scored[-1]["by_context"], scored[-1]["by_border"], flush=True)
    write_result(RESULT, "context_gain", scored)
    if options.record:
        RECORD.write_text(json.dumps([plain_record(scored)], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
