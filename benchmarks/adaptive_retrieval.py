"""Find a value far away with a tenth of the blocks: content-adaptive attention beside a window.

Each sequence has pairs of a key and a value at random positions of its first part, and filler
elsewhere. Its last two blocks ask for one of the keys, and the last one answers with the value of
that key, which lies further away than a local window of the same budget reaches. One attention
layer between an embedding and a readout. The model first learns with dense attention, then the gate
alone learns the mass of all blocks, then the model learns with a tenth of the blocks: those
that adaptive attention selects, or a window. A window from the first step is beside. One thread.

Run `python benchmarks/adaptive_retrieval.py`; `--quick` trains one seed for a few steps.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from dilated_sparse import create_adaptive_sparse_attention, create_block_sparse_attention
from harness import write_result
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

SEQ_LEN, BLOCK_SIZE, RATIO = 640, 16, 0.1
NUM_KEYS, NUM_VALUES, NUM_FILLERS, NUM_PAIRS = 32, 16, 16, 12
WIDTH, HEADS, BATCH, SEEDS = 64, 1, 16, (0, 1, 2)
NUM_BLOCKS = SEQ_LEN // BLOCK_SIZE
# The window keeps the last blocks; pairs end one block before it.
WINDOW_BLOCKS = round(RATIO * NUM_BLOCKS)
LAST_PAIR = (NUM_BLOCKS - 2 - WINDOW_BLOCKS) * BLOCK_SIZE


class Dense(nn.Module):
    """Dense attention, in the place of a sparse one."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, q: Any, k: Any, v: Any, is_causal: bool = False) -> torch.Tensor:
        """`(B, S, H, D)` q, k, v -> the same."""
        rows = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(*rows, is_causal=is_causal).transpose(1, 2)


class Retriever(nn.Module):
    """Sum of two embeddings of a position, attention, readout of a value."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.keys = nn.Embedding(NUM_KEYS + NUM_FILLERS, WIDTH)
        self.values = nn.Embedding(NUM_VALUES + 2, WIDTH)
        self.attention = attention
        self.readout = nn.Linear(WIDTH, NUM_VALUES)

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Logits of the last block."""
        x = self.keys(keys) + self.values(values)
        return self.readout(self.attention(x, x, x, is_causal=True)[:, -BLOCK_SIZE:])


def batch(size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys and values of each position, and the value to answer with."""
    keys = NUM_KEYS + torch.randint(NUM_FILLERS, (size, SEQ_LEN), generator=generator)
    values = torch.full((size, SEQ_LEN), NUM_VALUES)
    at = torch.rand(size, LAST_PAIR, generator=generator).argsort(1)[:, :NUM_PAIRS]
    pairs = torch.rand(size, NUM_KEYS, generator=generator).argsort(1)[:, :NUM_PAIRS]
    held = torch.randint(NUM_VALUES, (size, NUM_PAIRS), generator=generator)
    keys.scatter_(1, at, pairs)
    values.scatter_(1, at, held)
    keys[:, -2 * BLOCK_SIZE :] = pairs[:, :1]
    values[:, -2 * BLOCK_SIZE :] = NUM_VALUES + 1
    return keys, values, held[:, 0]


def accuracy(model: Retriever) -> float:
    """Share of 256 unseen sequences whose last position answers rightly."""
    generator = torch.Generator().manual_seed(10**6)
    model.eval()
    with torch.no_grad():
        right = 0.0
        for _ in range(4):
            keys, values, answer = batch(64, generator)
            right += float((model(keys, values)[:, -1].argmax(-1) == answer).float().mean()) / 4
    model.train()
    return right


class Steps(NamedTuple):
    """Training steps with dense attention, of the gate alone, and with a tenth of the blocks."""

    dense: int
    gate: int
    sparse: int


def train(kind: str, seed: int, steps: Steps) -> dict[str, Any]:
    """One trained model and its accuracy."""
    torch.manual_seed(seed)
    options: dict[str, Any] = {"sparsity_ratio": RATIO, "block_size": BLOCK_SIZE}
    if kind == "adaptive":
        attention = create_adaptive_sparse_attention(WIDTH, HEADS, layer_norm=False, **options)
    else:
        attention = create_block_sparse_attention(
            WIDTH, HEADS, layer_norm=False, pattern_type=kind, **options
        )
    model = Retriever(attention)
    sparse = attention.attention
    generator = torch.Generator().manual_seed(seed)
    start = time.process_time()
    accuracies: dict[str, float] = {}
    if steps.dense:
        attention.attention = Dense(sparse.config)
        learn(model, generator, steps.dense, lr=3e-3)
        accuracies["dense"] = accuracy(model)
        attention.attention = sparse
        accuracies["sparse at first"] = accuracy(model)
    if steps.gate:
        sparse.config = replace(sparse.config, distillation="all")
        optimizer = torch.optim.Adam(sparse.parameters(), lr=3e-3)
        for _ in range(steps.gate):
            keys, values, _ = batch(BATCH, generator)
            x = model.keys(keys) + model.values(values)
            q, k, _ = attention.project(x, x, x)
            optimizer.zero_grad()
            sparse.distillation_loss(q, k, is_causal=True).backward()
            optimizer.step()
        sparse.config = replace(sparse.config, distillation="kept")
        accuracies["trained gate"] = accuracy(model)
    learn(model, generator, steps.sparse, lr=3e-4 if steps.dense else 3e-3)
    row: dict[str, Any] = {
        "kind": kind,
        "seed": seed,
        "steps": steps._asdict(),
        "accuracy": accuracy(model),
        "accuracies_before": accuracies,
        "chance": 1 / NUM_VALUES,
        "kept_blocks_of_last_row": WINDOW_BLOCKS,
        "num_blocks": NUM_BLOCKS,
        "seq_len": SEQ_LEN,
        "block_size": BLOCK_SIZE,
        "sparsity_ratio": RATIO,
        "batch_size": BATCH,
        "cpu_s": time.process_time() - start,
    }
    print(f"{kind:>14} seed {seed}: {accuracies}, {row['accuracy']:.3f}", flush=True)
    return row


def learn(model: Retriever, generator: torch.Generator, steps: int, *, lr: float) -> None:
    """Train all parameters to answer."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(steps):
        keys, values, answer = batch(BATCH, generator)
        logits = model(keys, values)
        loss = cross_entropy(logits.flatten(0, 1), answer.repeat_interleave(BLOCK_SIZE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    torch.set_num_threads(1)
    if "--quick" in sys.argv[1:]:
        train("adaptive", 0, Steps(2, 2, 2))
        return
    rows = [
        train(kind, seed, steps)
        for seed in SEEDS
        for kind, steps in (
            ("adaptive", Steps(600, 300, 60)),
            ("local_window", Steps(600, 0, 60)),
            ("local_window", Steps(0, 0, 660)),
        )
    ]
    path = Path(__file__).parent / "results" / "adaptive_retrieval.json"
    write_result(path, "adaptive_retrieval", rows)


if __name__ == "__main__":
    main()
