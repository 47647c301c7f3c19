"""GigaPath's slide encoders with random weights: time and peak memory of a slide.

`python benchmarks/slides.py` writes results/slides.json. Each run has a process of its own, whose
peak memory counts the model, PyTorch and the slide. The largest slide has 45,681 tokens, as in
https://github.com/prov-gigapath/prov-gigapath/issues/12, where the published code needs 39.7 GB to
fine-tune on it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from dilated_core import MultiheadDilatedAttention, reference_dilated_attention
from dilated_models import LongNetSlideEncoder
from dilated_models.slide.config import config_of
from harness import high_water_bytes, peak_memory_in_fresh_process, write_result

RESULT = Path(__file__).parent / "results" / "slides.json"
FLASH, GIGAPATH = "gigapath_slide_enc12l384d", "gigapath_slide_enc12l768d"
RUNS = [
    (FLASH, 10_000, "embed"),
    (FLASH, 45_681, "embed"),
    (GIGAPATH, 10_000, "embed"),
    (GIGAPATH, 45_681, "embed"),
    (FLASH, 45_681, "train"),
    (GIGAPATH, 45_681, "train"),
]


def square_slide(tokens: int, in_chans: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tiles, one fewer than tokens, row by row on a square of cells."""
    count = tokens - 1
    side = int(count**0.5) + 1
    index = torch.arange(count)
    coords = torch.stack((index % side, index // side), dim=1)[None] * 256
    return torch.randn(1, count, in_chans), coords


def check(architecture: str) -> None:
    """Compare a small slide with the definition, before anything is timed."""
    encoder = LongNetSlideEncoder(config_of(architecture, depth=1)).eval()
    tiles, coords = square_slide(200, encoder.config.in_chans)
    with torch.no_grad():
        fast = encoder(tiles, coords)
        for module in encoder.modules():
            if isinstance(module, MultiheadDilatedAttention):
                module.attend = lambda q, k, v, **_: reference_dilated_attention(
                    q, k, v, encoder.config.pattern
                ).to(q.dtype)
        error = (encoder(tiles, coords) - fast).abs().max()
    if not error < 1e-4:
        raise RuntimeError(f"the slide encoder is off by {error}; a wrong result is not timed.")


def measure(architecture: str, tokens: int, kind: str) -> dict[str, Any]:
    """One run in this process, which should be a fresh one."""
    torch.manual_seed(0)
    check(architecture)
    config = config_of(architecture, activation_checkpointing=kind == "train", drop_path_rate=0.0)
    encoder = LongNetSlideEncoder(config).train(kind == "train")
    tiles, coords = square_slide(tokens, config.in_chans)
    start, start_cpu = time.perf_counter(), time.process_time()
    if kind == "train":
        encoder(tiles, coords, all_layers=True)[11].square().sum().backward()
    else:
        with torch.inference_mode():
            encoder(tiles, coords)
    return {
        "architecture": architecture,
        "kind": kind,
        "tokens": tokens,
        "embed_dim": config.embed_dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - start_cpu, 2),
        "peak_memory_bytes": high_water_bytes(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=3, metavar="X", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        architecture, tokens, kind = options.measure
        print(json.dumps(measure(architecture, int(tokens), kind)))
        return
    rows: list[dict[str, Any]] = []
    for architecture, tokens, kind in RUNS:
        arguments = ("--measure", architecture, str(tokens), kind)
        rows.append(peak_memory_in_fresh_process("slides.py", *arguments))
        print(json.dumps(rows[-1]), flush=True)
        # Written as it grows, so that a long run that is stopped leaves what it measured.
        write_result(options.out, "slides", rows)


if __name__ == "__main__":
    main()
