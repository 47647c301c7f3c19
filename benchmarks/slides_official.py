"""GigaPath's slide encoder beside the published code, with the same random weights on one slide.

`git clone https://github.com/prov-gigapath/prov-gigapath`, then
`uv run --all-packages --with einops python benchmarks/slides_official.py --official prov-gigapath`
writes results/slides_official.json.

On a CPU the published code stops at `assert flash_attn_func is not None`: its attention needs CUDA
and flash-attn, and has no other kernel. So it gets PyTorch's flash attention of the CPU here, the
very kernel that ours runs on, and its other packages that take no part are replaced by empty ones.
Its table of positions has GRID² rows instead of a million, which would be 3 GB more.
`--train` compares a training step, too; the published mixing weights have no gradient.

Each run has a process of its own, and the two take turns. Before anything is timed, ours loads the
weights of the published model, and both must give the same embedding.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
import types
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dilated_models.checkpoints import slide_encoder_from_gigapath
from harness import (
    high_water_bytes,
    peak_memory_in_fresh_process,
    reset_high_water,
    write_result,
)
from slides import square_slide
from torch import Tensor, nn

RESULT = Path(__file__).parent / "results" / "slides_official.json"
CHANNELS, WIDTH, DEPTH = 1536, 768, 12
GRID = 256
LAYER = 11  # the state that wrappers pool, and that training goes through here
RUNS = [("embed", 10_000, 2), ("embed", 45_681, 1)]


def flash_attention_of_the_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    bias: object = None,
    softmax_scale: float | None = None,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_func` as the published code calls it: (out (B, S, H, D), lse (B, H, S))."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        dropout,
        is_causal,
        scale=softmax_scale,
    )
    return out.transpose(1, 2), lse


def _unchanged(x: Any) -> Any:
    return x


def published_model(folder: Path) -> Any:
    """The published slide encoder with random weights, without dropout."""
    stand_ins: dict[str, dict[str, Any]] = {
        "timm": {},
        "timm.models": {},
        "timm.models.registry": {"register_model": _unchanged},
        "timm.models.layers": {"drop_path": _unchanged},
        "fairscale": {},
        "fairscale.nn": {"checkpoint_wrapper": _unchanged, "wrap": _unchanged},
        "huggingface_hub": {},
    }
    for name, attributes in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
    sys.path[:0] = [str(folder), str(folder / "gigapath")]
    made: Any = importlib.import_module("gigapath.slide_encoder").LongNetViT
    attention: Any = importlib.import_module("torchscale.component.multihead_attention")
    attention.flash_attn_func = flash_attention_of_the_cpu
    as_text = made.get_optimal_segment_length

    # Since NumPy 2 the list is printed as np.int64(1024), which the published code cannot read.
    def segment_lengths(*arguments: Any) -> str:
        return as_text(*arguments).replace("np.int64(", "").replace(")", "")

    made.get_optimal_segment_length = segment_lengths
    return made(
        in_chans=CHANNELS,
        embed_dim=WIDTH,
        depth=DEPTH,
        slide_ngrids=GRID,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        dropout=0.0,
        drop_path_rate=0.0,
    )


def measure(folder: Path, who: str, kind: str, tokens: int) -> dict[str, Any]:
    """One run in this process, which should be a fresh one."""
    torch.manual_seed(0)
    if who == "published":
        model = published_model(folder)

        def states(tiles: Tensor, coords: Tensor) -> list[Tensor]:
            return model(tiles, coords, all_layer_embed=kind == "train")
    else:
        model = ours(None, checkpoint=kind == "train")

        def states(tiles: Tensor, coords: Tensor) -> list[Tensor]:
            out = model(tiles, coords, all_layers=kind == "train")
            return list(out) if kind == "train" else [out]

    model.train(kind == "train")
    tiles, coords = square_slide(tokens, CHANNELS)
    reset_high_water()  # what building the table of positions needs does not count
    start, start_cpu = time.perf_counter(), time.process_time()
    if kind == "train":
        states(tiles, coords)[LAYER].square().sum().backward()
    else:
        with torch.inference_mode():
            states(tiles, coords)
    return {
        "who": who,
        "kind": kind,
        "tokens": tokens,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "seconds": round(time.perf_counter() - start, 2),
        "cpu_seconds": round(time.process_time() - start_cpu, 2),
        "peak_memory_bytes": high_water_bytes(),
    }


def ours(weights: dict[str, Tensor] | None, *, checkpoint: bool = False) -> nn.Module:
    """Our slide encoder, with the weights of the published one or random ones."""
    from dilated_models import LongNetSlideEncoder
    from dilated_models.slide.config import config_of

    config = config_of(
        "gigapath_slide_enc12l768d",
        slide_ngrids=GRID,
        activation_checkpointing=checkpoint,
        dropout=0.0,
        drop_path_rate=0.0,
    )
    if weights is None:
        return LongNetSlideEncoder(config)
    return slide_encoder_from_gigapath(weights, config)


def check(folder: Path) -> float:
    """The largest difference of an embedding; a wrong result is not timed."""
    torch.manual_seed(0)
    published = published_model(folder).eval()
    same = ours(published.state_dict()).eval()
    tiles, coords = square_slide(3000, CHANNELS)
    with torch.inference_mode():
        difference = (published(tiles, coords)[0] - same(tiles, coords)).abs().max().item()
    if not difference < 2e-5:
        raise RuntimeError(f"the embeddings differ by {difference}; a wrong result is not timed.")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", type=Path, required=True, help="checkout of prov-gigapath")
    parser.add_argument("--train", action="store_true", help="time a training step, too")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--measure", nargs=3, metavar="X", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder: Path = options.official.resolve()
    if options.measure:
        who, kind, tokens = options.measure
        print(json.dumps(measure(folder, who, kind, int(tokens))))
        return
    difference = check(folder)
    print(f"largest difference of the embedding of 3,000 tokens: {difference:.1e}", flush=True)
    rows: list[dict[str, Any]] = []
    runs = [*RUNS, ("train", 10_000, 1)] if options.train else RUNS
    for kind, tokens, rounds in runs:
        for _ in range(rounds):
            for who in ("ours", "published"):
                arguments = ("--measure", who, kind, str(tokens), "--official", str(folder))
                row = peak_memory_in_fresh_process("slides_official.py", *arguments)
                rows.append({**row, "difference": difference})
                print(json.dumps(rows[-1]), flush=True)
                write_result(options.out, "slides_official", rows)


if __name__ == "__main__":
    main()
