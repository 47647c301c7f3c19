"""Softmax mass that selections of blocks keep, on attention of a model of `dilated train`.

    dilated train --seed 0 --out runs/copies-0
    python benchmarks/adaptive_recall.py runs/copies-0

writes results/adaptive_recall.json. Queries and keys of each layer are recorded on text of the
standard library, before and after their rotation. The gate of each layer learns from the training
files (`distillation="all"`), and every method is scored on the same validation files: the share of
each query's dense causal softmax that lies in the kept blocks, a mean over rows of blocks that
cannot keep all. All methods keep a tenth of the blocks of each row, and the row's own. SubBlock is
the log of Σ exp(mean query · mean key · scale) over sub-blocks; the estimate is the same with the
softmax of each mean query normalised. One thread.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from dilated_models import load_model
from dilated_models.text.files import split_files, standard_library_files
from dilated_models.text.streams import ByteStream
from dilated_sparse import AdaptiveSparseAttention
from dilated_sparse.adaptive.choice import Rows, kept_blocks
from dilated_sparse.adaptive.learning import block_mass
from harness import write_result

SEQ_LEN, BLOCK_SIZE, SUB_BLOCK_SIZE, RATIO = 1024, 16, 4, 0.1
TRAINING, VALIDATION, STEPS, BATCH, LEARNING_RATE = 96, 6, 120, 2, 1e-2
FINER = 2  # positions of a sub-block, for the selection that reads the queries of the block
RESULT = Path(__file__).parent / "results" / "adaptive_recall.json"

Recorded = dict[str, torch.Tensor]


def record(model: Any, tokens: torch.Tensor) -> list[Recorded]:
    """Queries and keys of each layer: rotated `q`, `k` and before the rotation `q0`, `k0`."""
    layers = [m for m in model.modules() if hasattr(m, "project") and hasattr(m, "attend")]
    found: list[Recorded] = [{} for _ in layers]
    for layer, kept in zip(layers, found, strict=True):
        project, attend = layer.project, layer.attend

        def projected(*x: torch.Tensor, project: Any = project, kept: Recorded = kept) -> Any:
            q, k, v = project(*x)
            kept.update(q0=q.detach(), k0=k.detach())
            return q, k, v

        def attended(q: Any, k: Any, v: Any, *, attend: Any = attend, kept: Any = kept, **x: Any):
            kept.update(q=q.detach(), k=k.detach())
            return attend(q, k, v, **x)

        layer.project, layer.attend = projected, attended
    with torch.no_grad():
        model(tokens)
    for layer in layers:
        del layer.project, layer.attend
    return found


def sample(data: ByteStream, number: int, seed: int) -> torch.Tensor:
    """Windows of bytes, `(number, SEQ_LEN)`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(data) - SEQ_LEN, (number,), generator=generator).tolist()
    return torch.stack([torch.from_numpy(data.read(a, a + SEQ_LEN)) for a in starts]).long()


def options(lookahead: bool, sub_block_size: int) -> dict[str, Any]:
    return {
        "sparsity_ratio": RATIO,
        "block_size": BLOCK_SIZE,
        "sub_block_size": sub_block_size,
        "lookahead": lookahead,
        "local_blocks": 0,  # the methods beside it keep no block but the row's own, either
        "sink_blocks": 0,
    }


def sub_block_scores(part: Recorded) -> torch.Tensor:
    """SubBlock's score of each pair of blocks, `(B, H, N, N)`."""
    q, k = (part[x].unflatten(1, (-1, SUB_BLOCK_SIZE)).mean(2).transpose(1, 2) for x in ("q", "k"))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    sizes = (-1, BLOCK_SIZE // SUB_BLOCK_SIZE)
    return scores.unflatten(3, sizes).unflatten(2, sizes).logsumexp((3, 5))


def recalls(
    gates: dict[str, AdaptiveSparseAttention], part: Recorded, seed: int
) -> dict[str, float]:
    """The mass that each method keeps on one layer of one sequence."""
    q, k = part["q"], part["k"]
    mass = block_mass(q, k, block_size=BLOCK_SIZE, scale=q.shape[-1] ** -0.5, is_causal=True)
    N = mass.shape[-1]
    i = torch.arange(N)
    means = [x.unflatten(1, (N, BLOCK_SIZE)).mean(2).transpose(1, 2) for x in (q, k)]
    generator = torch.Generator().manual_seed(seed)
    scores = {
        "oracle": mass,
        "SubBlock, queries of the block": sub_block_scores(part),
        "mean pool, queries of the block": means[0] @ means[1].transpose(-1, -2),
        "mean pool, queries before": means[0].roll(1, 2) @ means[1].transpose(-1, -2),
        "random": torch.rand(mass.shape, generator=generator),
        "local": (-(i[:, None] - i).abs()).float().expand(mass.shape),
    }
    budget = gates["budget"].config.budget
    rows = Rows(0, N, True, None)
    kept = {name: kept_blocks(x, budget, rows) for name, x in scores.items()}
    for name, gate in gates.items():
        if name != "budget":
            selection = gate.select(q, k, is_causal=True, unrotated=(part["q0"], part["k0"]))
            kept[name] = selection.materialize()
    limited = i >= 2  # earlier rows keep their own block and have at most one other
    return {name: float((mass * mask).sum(-1)[:, :, limited].mean()) for name, mask in kept.items()}


def module(
    part: Recorded, lookahead: bool, sub_block_size: int = SUB_BLOCK_SIZE
) -> AdaptiveSparseAttention:
    heads, head_dim = part["q"].shape[2:]
    return AdaptiveSparseAttention(
        num_heads=heads,
        head_dim=head_dim,
        distillation="all",
        **options(lookahead, sub_block_size),
    )


def learn(gate: AdaptiveSparseAttention, parts: list[Recorded], steps: int) -> list[float]:
    """Train a gate on recorded queries and keys; returns its losses."""
    optimizer = torch.optim.Adam(gate.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    losses: list[float] = []
    for step in range(steps):
        chosen = [parts[(step * BATCH + n) % len(parts)] for n in range(BATCH)]
        part = {name: torch.cat([x[name] for x in chosen]) for name in chosen[0]}
        before = part["q0"], part["k0"]
        loss = gate.distillation_loss(part["q"], part["k"], is_causal=True, unrotated=before)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="few steps, writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pieces, skipped = standard_library_files()
    split = split_files(pieces, skipped, validation_share=0.05)
    model = load_model(arguments.run, device="cpu").eval()
    train, test = (
        [record(model, row.unsqueeze(0)) for row in sample(ByteStream(data), number, seed)]
        for data, number, seed in zip(
            (split.train, split.validation), (TRAINING, VALIDATION), (1, 2), strict=True
        )
    )
    rows: list[dict[str, Any]] = []
    for layer in range(len(train[0])):
        parts = [x[layer] for x in train]
        gates = {"budget": module(parts[0], False)}
        losses: dict[str, list[float]] = {}
        for lookahead in (False, True):
            queries = "queries of the block" if lookahead else "queries before"
            gates[f"estimate, {queries}"] = module(parts[0], lookahead)
            gates[f"trained gate, {queries}"] = gate = module(parts[0], lookahead)
            steps = 6 if arguments.quick else arguments.steps
            losses[queries] = learn(gate, parts, steps)
            if lookahead:
                finer = module(parts[0], lookahead, FINER)
                gates[f"trained gate, {queries}, sub-blocks of {FINER}"] = finer
                losses[f"{queries}, sub-blocks of {FINER}"] = learn(finer, parts, steps)
        kept = [recalls(gates, x[layer], seed) for seed, x in enumerate(test)]
        recall = {name: statistics.mean(x[name] for x in kept) for name in kept[0]}
        rows.append(
            {
                "layer": layer,
                "recall": recall,
                "of_oracle": {name: x / recall["oracle"] for name, x in recall.items()},
                "first_and_last_loss": {k: [v[0], v[-1]] for k, v in losses.items()},
                "sparsity_ratio": RATIO,
                "seq_len": SEQ_LEN,
                "block_size": BLOCK_SIZE,
                "sub_block_size": SUB_BLOCK_SIZE,
                "steps": arguments.steps,
                "batch_size": BATCH,
                "learning_rate": LEARNING_RATE,
                "sequences": [TRAINING, VALIDATION],
            }
        )
        print(layer, {name: round(x, 3) for name, x in rows[-1]["of_oracle"].items()}, flush=True)
    if not arguments.quick:
        write_result(RESULT, "adaptive_recall", rows)


if __name__ == "__main__":
    main()
