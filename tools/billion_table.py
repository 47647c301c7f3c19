"""The table of docs/context-parallel.md: `python -m tools.billion_table`.

`exchange_plan` computes every number; times are lower limits from the figures of a data sheet.
"""

import argparse
import sys
from pathlib import Path

from dilated_core import select_segments
from dilated_ring import exchange_plan

PAGE = Path(__file__).parent.parent / "docs" / "context-parallel.md"
BEGIN, END = "<!-- python -m tools.billion_table writes this table -->\n", "<!-- end -->\n"
SEQ_LEN, NUM_HEADS, HEAD_DIM, ITEMSIZE = 10**9, 8, 64, 2
GPUS = (8, 32, 128, 512, 1024)
# NVIDIA H100 SXM: bfloat16 without sparsity. DGX H100: a port of 400 Gbit/s for each GPU.
FLOPS_PER_S, BYTES_PER_S = 989e12, 50e9


def table() -> str:
    """A row for each number of GPUs."""
    pattern = select_segments(SEQ_LEN, num_heads=NUM_HEADS).pattern
    lines = [
        "| GPUs | positions each | tensors each | sent each | to gather K, V | hops "
        "| FLOPs each | compute at least | send at least |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for size in GPUS:
        plan = exchange_plan(
            pattern, SEQ_LEN, size, num_heads=NUM_HEADS, head_dim=HEAD_DIM, is_causal=True
        )
        positions = max(rank.num_positions for rank in plan.ranks)
        # q, k, v, out and their gradients.
        held = 8 * positions * NUM_HEADS * HEAD_DIM * ITEMSIZE
        sent = max(rank.forward_bytes + rank.backward_bytes for rank in plan.ranks)
        flops = max(rank.forward_flops + rank.backward_flops for rank in plan.ranks)
        cells = [
            f"{size:,}",
            f"{positions:,}",
            f"{held / 1e9:,.0f} GB",
            f"{sent / 1e6:,.0f} MB",
            f"{max(plan.gathering_bytes) / 1e9:,.0f} GB",
            f"{plan.num_hops}",
            f"{flops:.1e}",
            f"{1e3 * flops / FLOPS_PER_S:,.0f} ms",
            f"{1e3 * sent / BYTES_PER_S:,.1f} ms",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write the table into the page, or with `--check` compare it with the one there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the table is out of date")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    text = options.page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END, 1)
    current = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if not options.check:
        options.page.write_text(current, encoding="utf-8")
    elif text != current:
        print(f"{options.page} is out of date; write it with: python -m tools.billion_table")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
