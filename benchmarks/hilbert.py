"""When a Hilbert order pays: as an order of tokens of a grid, and as an order of tiles.

As an order of tokens it keeps neighbours of a grid within one segment. The share of neighbouring
pairs whose tokens share a segment is counted, against tokens row by row. As an order of tiles it
changes no value; its time is a ratio to that of tiles row by row, in turn in one process, in CPU
seconds. Run `python benchmarks/hilbert.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from dilated_core import (
    AttentionInputs,
    AttentionOptions,
    AttentionOutput,
    DilatedPattern,
    Span,
    attend_,
    choose_backend,
    empty_partial,
    plan_problems,
)
from dilated_sparse import hilbert_order, hilbert_token_order
from harness import write_result

SEGMENTS = (64, 256, 1024)
NUM_HEADS, HEAD_DIM = 4, 64
TILES = ((8192, 512), (8192, 2048))
ROUNDS = 7


def _rectangle(height: int, width: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.cartesian_prod(torch.arange(height), torch.arange(width))


def _tissue() -> torch.Tensor:
    """Cells of a grid of 128 × 160 in three ellipses, row by row: about a third of it."""
    rows, columns = torch.meshgrid(torch.arange(128), torch.arange(160), indexing="ij")
    inside = torch.zeros(128, 160, dtype=torch.bool)
    for row, column, height, width in ((40, 40, 30, 25), (80, 110, 40, 30), (100, 30, 15, 28)):
        inside |= ((rows - row) / height) ** 2 + ((columns - column) / width) ** 2 <= 1
    return inside.nonzero()


GRIDS: dict[str, Callable[[], torch.Tensor]] = {
    "square": _rectangle(128, 128),
    "rectangle": _rectangle(60, 300),
    "tall": _rectangle(300, 60),
    "slide": _tissue,
}


def locality(name: str, cells: torch.Tensor, segment: int) -> dict[str, Any]:
    """Share of pairs of neighbours, in a row or a column, that one segment holds, by order."""
    place = {cell: i for i, cell in enumerate(map(tuple, cells.tolist()))}
    pairs = [
        (i, place[neighbour])
        for (row, column), i in place.items()
        for neighbour in ((row + 1, column), (row, column + 1))
        if neighbour in place
    ]
    first, second = torch.tensor(pairs).T
    orders = {"hilbert": hilbert_token_order(cells), "row_by_row": torch.arange(len(cells))}
    shares: dict[str, float] = {}
    for order_name, order in orders.items():
        number = order.argsort() // segment
        shares[order_name] = round(float((number[first] == number[second]).double().mean()), 4)
    return {"part": "locality", "grid": name, "tokens": len(cells), "segment": segment} | shares


def tile_orders(
    seq_len: int, tile: int, *, is_causal: bool, rounds: int = ROUNDS
) -> dict[str, Any]:
    """CPU time of dense attention in tiles along the curve, as ratios to tiles row by row."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, seq_len, NUM_HEADS, HEAD_DIM, generator=generator).unbind()
    pattern, n = DilatedPattern([seq_len], [1]), seq_len // tile
    inputs = AttentionInputs(q.device, q.dtype, NUM_HEADS, HEAD_DIM, is_rectangular=True)
    backend = choose_backend("auto", inputs)
    options = AttentionOptions(is_causal, HEAD_DIM**-0.5)

    def attend(order: torch.Tensor) -> AttentionOutput:
        into = empty_partial(q.shape, dtype=q.dtype, device=q.device)
        for cell in order.tolist():
            queries, keys = (slice(i * tile, (i + 1) * tile) for i in divmod(cell, n))
            problems = plan_problems(
                pattern,
                queries=Span(queries.start, queries.stop),
                keys=Span(keys.start, keys.stop),
                seq_len=seq_len,
                num_heads=NUM_HEADS,
                is_causal=is_causal,
            )
            rows = AttentionOutput(into.out[:, queries], into.lse[:, queries])
            tensors = (q[:, queries], k[:, keys], v[:, keys])
            attend_(rows, problems, *tensors, options, backend=backend)
        return into

    along, by_rows = hilbert_order(n, n), torch.arange(n * n)
    torch.testing.assert_close(attend(along).out, attend(by_rows).out)  # and both are warm
    ratios: list[float] = []
    for _ in range(rounds):
        times: list[float] = []
        for order in (along, by_rows):
            start = time.process_time()
            attend(order)
            times.append(time.process_time() - start)
        ratios.append(times[0] / times[1])
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "part": "tile_orders",
        "seq_len": seq_len,
        "tile": tile,
        "is_causal": is_causal,
        "num_heads": NUM_HEADS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "ratio": {"low": round(low, 3), "median": round(median, 3), "high": round(high, 3)},
    }


def main() -> None:
    """Count and measure everything; `--quick` only counts."""
    torch.set_num_threads(1)
    rows = [locality(name, make(), w) for name, make in GRIDS.items() for w in SEGMENTS]
    for row in rows:
        print(row, flush=True)
    if "--quick" in sys.argv[1:]:
        return
    for seq_len, tile in TILES:
        for is_causal in (False, True):
            rows.append(tile_orders(seq_len, tile, is_causal=is_causal))
            print(rows[-1], flush=True)
    write_result(Path(__file__).parent / "results" / "hilbert.json", "hilbert", rows)


if __name__ == "__main__":
    main()
