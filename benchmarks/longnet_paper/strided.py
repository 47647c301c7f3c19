"""Do branches with rates above 1 learn to copy? Accuracy by distance, by place and by residue.

Random tokens repeat at one distance, so only the token one distance back tells the next one. Near
distances lie inside the segments of rate 1; the far ones only branches with rates 2 and 4 reach. A
head of rate r sees positions that are the same modulo r as the query, so the token that follows a
match is among them only if the distance is 1 modulo r. Otherwise two layers must work together.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from border_copies import Shifted
from dilated_models import LongNetConfig, LongNetLM
from torch import Tensor

from longnet_paper.sizes import Size
from longnet_paper.training import Batch, fit

NUM_TOKENS, SEQ_LEN, SEGMENT = 32, 128, 32
BATCH_SIZE, STEPS = 16, 3000
EDITED_SHARE = 0.1
NEAR, FAR = (8, 31), (32, 63)  # FAR: beyond every segment of rate 1
DISTANCES = ((8, 15), (16, 31), FAR)
PLACES = ((0, 7), (8, 15), (16, 31))
TEXTS_PER_DISTANCE = 4

LONGNET = {"segment_lengths": (SEGMENT, 2 * SEGMENT, SEQ_LEN), "dilation_rates": (1, 2, 4)}
CONTENDERS: dict[str, dict[str, Any]] = {
    "dense": {"segment_lengths": (SEQ_LEN,), "dilation_rates": (1,)},
    "LongNet": LONGNET,
    "LongNet, far copies only": LONGNET,
    "shifted layers": LONGNET,
    "local window": LONGNET | {"local_window": SEGMENT},
}


def build(name: str, seed: int) -> LongNetLM:
    """A contender; in "shifted layers" the segments of every second one begin half earlier."""
    torch.manual_seed(seed)
    config = LongNetConfig(
        num_tokens=NUM_TOKENS,
        d_model=48,
        nhead=4,
        num_decoder_layers=2,
        dim_feedforward=96,
        positions="rotary",
        key_conv=4,
        tie_embeddings=True,
        **CONTENDERS[name],
    )
    model = LongNetLM(config)
    if name == "shifted layers":
        for block in list(model.blocks)[1::2]:
            inner: Any = block.attention
            inner.attention = Shifted(inner.attention, SEGMENT // 2)
    return model


def copies(step: int, seed: int, distances: tuple[int, int]) -> Batch:
    """Random tokens that repeat at distances drawn log-uniformly, 10 % of them replaced."""
    random = np.random.default_rng((seed, step))
    rows: list[Any] = []
    for _ in range(BATCH_SIZE):
        low, high = np.log(distances)
        distance = round(np.exp(random.uniform(low, high)))
        row = np.resize(random.integers(NUM_TOKENS, size=distance), SEQ_LEN + 1)
        edited = random.random(len(row)) < EDITED_SHARE
        row[edited] = random.integers(NUM_TOKENS, size=int(edited.sum()))
        rows.append(row)
    tokens = torch.from_numpy(np.stack(rows))
    return tokens[:, :-1], tokens[:, 1:]


def measure(name: str, seed: int, size: Size, device: str = "cpu") -> dict[str, Any]:
    """Train and score one contender; `size.scale` times as many steps."""
    model, began = build(name, seed).to(device), time.process_time()
    distances = FAR if "far" in name else (NEAR[0], FAR[1])
    losses = fit(model, lambda step: copies(step, seed, distances), steps=STEPS * size.scale)
    return {
        "contender": name,
        "seed": seed,
        "scale": size.scale,
        "steps": len(losses),
        "tokens": len(losses) * BATCH_SIZE * SEQ_LEN,
        "last_loss": round(sum(losses[-20:]) / 20, 4),
        "accuracy": copy_accuracy(model),
        "train_cpu_s": round(time.process_time() - began, 1),
        "model": model.config.to_dict(),
    }


@torch.no_grad()
def copy_accuracy(model: LongNetLM) -> list[dict[str, Any]]:
    """Share of right tokens, by range of distances, of places in the segment, and by residue.

    Scored are the queries of the second half that follow at least 8 tokens of the repetition.
    Residue is (distance - 1) modulo 4: 0 if branches of rates 2 and 4 see the token that follows a
    match, 2 if only that of rate 2 does, and 1 or 3 if neither does.
    """
    model.eval()
    device = next(model.parameters()).device
    random = np.random.default_rng(1)
    query = torch.arange(SEQ_LEN)
    rows: list[dict[str, Any]] = []
    for nearest, farthest in DISTANCES:
        right, total = torch.zeros(4, SEQ_LEN), torch.zeros(4, SEQ_LEN)
        for distance in range(nearest, farthest + 1):
            noise = random.integers(NUM_TOKENS, size=(TEXTS_PER_DISTANCE, distance))
            tokens = torch.from_numpy(np.stack([np.resize(x, SEQ_LEN + 1) for x in noise]))
            guess = model(tokens[:, :-1].to(device)).argmax(-1).cpu()
            scored = query >= max(SEQ_LEN // 2, distance + 8)
            right[(distance - 1) % 4] += (guess == tokens[:, 1:]).sum(0) * scored
            total[(distance - 1) % 4] += TEXTS_PER_DISTANCE * scored
        for residue in range(4):
            for first, last in PLACES:
                place = query % SEGMENT
                here = (place >= first) & (place <= last)
                rows.append(
                    {
                        "distances": [nearest, farthest],
                        "residue": residue,
                        "places": [first, last],
                        "right": _sum(right[residue], here),
                        "total": _sum(total[residue], here),
                    }
                )
    return rows


def _sum(counts: Tensor, here: Tensor) -> int:
    return int(counts[here].sum())
