"""Draw the block patterns that docs/block-sparse.md shows: `python -m tools.draw_blocks`.

Every square comes from `BlockPattern.materialize`, so the picture is what attention computes. The
SVG is written by hand: the same bytes everywhere, and nothing to install.
"""

import argparse
import sys
from pathlib import Path
from typing import cast

from dilated_core import DilatedPattern
from dilated_sparse import (
    BlockPattern,
    dilated_sparse,
    from_dilated,
    global_local,
    hierarchical,
    local_window,
    random_blocks,
)

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "block_patterns.svg"
NUM_BLOCKS = 32
PATTERNS = {
    "local_window(window=2)": local_window(NUM_BLOCKS, window=2),
    "dilated_sparse(sparsity_ratio=0.25)": dilated_sparse(NUM_BLOCKS, sparsity_ratio=0.25),
    "global_local(window=1, num_global=2)": global_local(NUM_BLOCKS, window=1, num_global=2),
    "hierarchical()": hierarchical(NUM_BLOCKS),
    "global_local | random_blocks": global_local(NUM_BLOCKS, window=1, num_global=1)
    | random_blocks(NUM_BLOCKS, num_random=3),
    "from_dilated([4, 16], [1, 4])": from_dilated(
        DilatedPattern([4 * 64, 16 * 64], [1, 4]), 64 * NUM_BLOCKS, 64, num_heads=1
    ),
}
CELL, GAP, TOP, PER_ROW = 6, 40, 40, 3
KEPT, ABOVE, NOTHING = "#4263eb", "#bac8ff", "#f1f3f5"


def draw(patterns: dict[str, BlockPattern]) -> str:
    """One square per kept block; lighter above the diagonal, which causal attention skips."""
    side = CELL * max(pattern.num_blocks for pattern in patterns.values())
    num_rows = -(-len(patterns) // PER_ROW)
    width, height = PER_ROW * (side + GAP) + GAP, num_rows * (side + GAP + 16) + TOP
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (name, pattern) in enumerate(patterns.items()):
        left = GAP + (number % PER_ROW) * (side + GAP)
        top = TOP + (number // PER_ROW) * (side + GAP + 16)
        lines.append(f'<text x="{left}" y="{top - 20}" font-weight="bold">{name}</text>')
        lines.append(f'<text x="{left}" y="{top - 7}">{pattern.sparsity_ratio:.0%} kept</text>')
        lines.append(
            f'<rect x="{left}" y="{top}" width="{side}" height="{side}" fill="{NOTHING}"/>'
        )
        cells = cast("list[list[int]]", pattern.materialize()[0].nonzero().tolist())
        for i, j in cells:
            lines.append(
                f'<rect x="{left + j * CELL}" y="{top + i * CELL}" width="{CELL}" '
                f'height="{CELL}" fill="{KEPT if j <= i else ABOVE}"/>'
            )
    return "\n".join([*lines, "</svg>", ""])


def main(arguments: list[str] | None = None) -> int:
    """Write the picture, or with `--check` compare it with the one on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the picture is out of date")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    svg = draw(PATTERNS)
    if not options.check:
        options.picture.write_text(svg)
    elif not options.picture.exists() or options.picture.read_text() != svg:
        print(f"{options.picture} is out of date; write it with: python -m tools.draw_blocks")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
