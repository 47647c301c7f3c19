"""How well small models copy across borders of segments: dense, LongNet, and remedies.

Each model trains on edited copies of random tokens (`dilated_models.text.copies`), so that only the
token one distance back tells the next one. Then it copies at fixed distances, and the share of
right tokens is recorded by distance and by the token's place in its segment of rate 1. Run
`python benchmarks/border_copies.py`; `--quick` trains one model for a few steps. One thread;
accuracies do not depend on how busy the machine is.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dilated_core import DilatedAttention
from dilated_models import LongNetConfig, LongNetLM
from dilated_models.text.copies import copied_row
from harness import write_result
from longnet_paper.training import Batch, fit
from torch import Tensor, nn
from torch.nn.functional import pad

RESULT = Path(__file__).parent / "results" / "border_copies.json"
NUM_TOKENS, SEQ_LEN, SEGMENT = 64, 256, 128
STEPS, BATCH_SIZE = 600, 8
SEEDS = (0, 1, 2)
DISTANCES = ((16, 31), (32, 63), (64, 127))
PLACES = ((0, 15), (16, 31), (32, 63), (64, 127))
TEXTS_PER_DISTANCE = 8

LONGNET = {"segment_lengths": (SEGMENT, SEQ_LEN), "dilation_rates": (1, 4)}
CONTENDERS: dict[str, dict[str, Any]] = {
    "dense": {"segment_lengths": (SEQ_LEN,), "dilation_rates": (1,)},
    "LongNet": LONGNET,
    "shifted layers": LONGNET,
    "two borders": {
        "segment_lengths": (SEGMENT, SEGMENT * 3 // 2, SEQ_LEN),
        "dilation_rates": (1, 1, 4),
    },
    "window of 64": LONGNET | {"local_window": SEGMENT // 2},
    "window of 128": LONGNET | {"local_window": SEGMENT},
}


class NoiseStream:
    """A `TokenStream` of random tokens, one document."""

    def __init__(self, seed: int) -> None:
        self._tokens = np.random.default_rng(seed).integers(NUM_TOKENS, size=2**18)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, stop: int) -> Any:
        """See `TokenStream`."""
        return self._tokens[start:stop].copy()

    def byte_lengths(self, start: int, stop: int) -> Any:
        """See `TokenStream`."""
        return np.ones(stop - start, dtype=np.int64)

    def document_starts(self, start: int, stop: int) -> Any:
        """See `TokenStream`."""
        return np.zeros(1 if start == 0 else 0, dtype=np.int64)

    def text_of(self, start: int, stop: int) -> bytes:
        """See `TokenStream`."""
        return bytes(self._tokens[start:stop].tolist())


class Shifted(nn.Module):
    """Attention whose segments begin `shift` earlier, by hidden keys before the sequence."""

    def __init__(self, attention: nn.Module, shift: int) -> None:
        super().__init__()
        self.attention, self.config, self.shift = attention, attention.config, shift

    def forward(self, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
        """`(B, S, H, D)` q, k, v -> the same shape."""
        shift = self.shift
        mask = torch.zeros(q.shape[0], shift + q.shape[1], dtype=torch.bool, device=q.device)
        mask[:, :shift] = True
        q, k, v = (pad(x, (0, 0, 0, 0, shift, 0)) for x in (q, k, v))
        return self.attention(q, k, v, is_causal=is_causal, key_padding_mask=mask)[:, shift:]


def build(name: str, seed: int) -> LongNetLM:
    """A contender; in "shifted layers" every second layer is `Shifted`."""
    torch.manual_seed(seed)
    config = LongNetConfig(
        num_tokens=NUM_TOKENS,
        d_model=64,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=128,
        positions="rotary",
        key_conv=4,
        tie_embeddings=True,
        **CONTENDERS[name],
    )
    model = LongNetLM(config)
    if name == "shifted layers":
        for block in list(model.blocks)[1::2]:
            assert isinstance(block.attention.attention, DilatedAttention)
            block.attention.attention = Shifted(block.attention.attention, SEGMENT // 2)
    return model


def train(model: LongNetLM, stream: NoiseStream, *, seed: int, steps: int) -> float:
    """Train on edited copies; returns the last loss, in nats."""

    def batch(step: int) -> Batch:
        rows = [
            copied_row(
                stream, seq_len=SEQ_LEN, window=SEQ_LEN, seed=seed, sample=step * BATCH_SIZE + i
            )
            for i in range(BATCH_SIZE)
        ]
        inputs, targets = (
            torch.from_numpy(np.stack([getattr(row, part) for row in rows]))
            for part in ("inputs", "targets")
        )
        return inputs, targets

    return fit(model, batch, steps=steps)[-1]


@torch.no_grad()
def copy_accuracy(model: LongNetLM, stream: NoiseStream) -> list[dict[str, Any]]:
    """Share of right tokens for each range of distances and of places in the segment.

    Tokens repeat at one distance, without edits. Scored is what follows the first repetition of at
    least 8 tokens, behind the first segment.
    """
    model.eval()
    rows: list[dict[str, Any]] = []
    random = np.random.default_rng(1)
    places = torch.arange(SEQ_LEN) % SEGMENT  # of the queries
    for nearest, farthest in DISTANCES:
        right, total = torch.zeros(SEQ_LEN), torch.zeros(SEQ_LEN)
        for distance in range(nearest, farthest + 1, 3):
            starts = random.integers(len(stream) - distance, size=TEXTS_PER_DISTANCE)
            texts = [np.resize(stream.read(s, s + distance), SEQ_LEN + 1) for s in starts]
            tokens = torch.from_numpy(np.stack(texts))
            correct = model(tokens[:, :-1]).argmax(-1) == tokens[:, 1:]
            scored = torch.arange(SEQ_LEN) >= max(SEGMENT, distance + 8)
            right += correct.float().sum(0) * scored
            total += TEXTS_PER_DISTANCE * scored
        for first, last in PLACES:
            here = (places >= first) & (places <= last)
            rows.append(
                {
                    "distances": [nearest, farthest],
                    "places": [first, last],
                    "accuracy": round(float(right[here].sum() / total[here].sum()), 4),
                    "tokens": int(total[here].sum()),
                }
            )
    return rows


def measure(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Train and score one contender."""
    torch.set_num_threads(1)
    model, began = build(name, seed), time.process_time()
    loss = train(model, NoiseStream(seed), seed=seed, steps=steps)
    row = {
        "contender": name,
        "seed": seed,
        "steps": steps,
        "tokens": steps * BATCH_SIZE * SEQ_LEN,
        "last_loss": round(loss, 4),
        "train_cpu_s": round(time.process_time() - began, 1),
        "accuracy": copy_accuracy(model, NoiseStream(1000 + seed)),
        "model": model.config.to_dict(),
    }
    by_place = " ".join(f"{part['accuracy']:.2f}" for part in row["accuracy"])
    print(f"{name:>15} seed {seed}: {by_place}, loss {loss:.3f}", flush=True)
    return row


def main() -> None:
    """Train all contenders, or one with `--quick`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--contender", choices=list(CONTENDERS))
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each")
    options = parser.parse_args()
    if options.quick or options.contender:
        measure(options.contender or "window of 64", 0, 10 if options.quick else STEPS)
        return
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        seeds = [seed for seed in SEEDS for _ in CONTENDERS]
        # Rows come seed by seed, and the file always holds whole seeds.
        for row in pool.map(measure, [*CONTENDERS] * len(SEEDS), seeds, repeat(STEPS)):
            rows.append(row)
            if len(rows) % len(CONTENDERS) == 0:
                write_result(RESULT, "border_copies", rows)


if __name__ == "__main__":
    main()
