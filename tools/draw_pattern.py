"""Draw the picture of a pattern that the README shows: `python -m tools.draw_pattern`.

Every square comes from `DilatedPattern.materialize`, branch by branch, so the picture is what the
code does. The SVG is written by hand: the same bytes everywhere, and nothing to install.
"""

import argparse
import sys
from pathlib import Path

from dilated_core import DilatedPattern

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "pattern.svg"
SEQ_LEN, NUM_HEADS = 32, 4
PATTERN = DilatedPattern([8, 16, 32], [1, 2, 4])
COLOURS = ("#4263eb", "#f59f00", "#0ca678")
CELL, GAP, TOP = 6, 26, 52


def draw(pattern: DilatedPattern, seq_len: int, num_heads: int) -> str:
    """One square per (query, key) pair and head, coloured by the branches that see the pair."""
    side = seq_len * CELL
    width = num_heads * (side + GAP) + GAP
    height = TOP + side + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for i, (w, r) in enumerate(pattern.branches):
        x = GAP + 130 * i
        lines.append(f'<rect x="{x}" y="10" width="12" height="12" fill="{COLOURS[i]}"/>')
        lines.append(f'<text x="{x + 18}" y="21">w = {w}, r = {r}</text>')
    branches = [
        DilatedPattern([w], [r], head_offsets=pattern.head_offsets).materialize(seq_len, num_heads)
        for w, r in pattern.branches
    ]
    for head in range(num_heads):
        left = GAP + head * (side + GAP)
        lines.append(f'<text x="{left}" y="{TOP - 8}">head {head}</text>')
        lines.append(f'<rect x="{left}" y="{TOP}" width="{side}" height="{side}" fill="#f1f3f5"/>')
        for query in range(seq_len):
            for key in range(seq_len):
                seen = [i for i, counts in enumerate(branches) if counts[head, query, key]]
                # A pair that several branches see counts several times: one bar for each.
                for bar, i in enumerate(seen):
                    bar_width = CELL / len(seen)
                    lines.append(
                        f'<rect x="{left + key * CELL + bar * bar_width:g}" '
                        f'y="{TOP + query * CELL}" width="{bar_width:g}" height="{CELL}" '
                        f'fill="{COLOURS[i]}"/>'
                    )
    caption = (
        "Rows are queries, columns keys. w: segment length, r: dilation rate. "
        "A key that two branches select counts twice."
    )
    lines.append(f'<text x="{GAP}" y="{height - 10}">{caption}</text>')
    return "\n".join([*lines, "</svg>", ""])


def main(arguments: list[str] | None = None) -> int:
    """Write the picture, or with `--check` compare it with the one on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the picture is out of date")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    svg = draw(PATTERN, SEQ_LEN, NUM_HEADS)
    if not options.check:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(svg)
    elif not options.picture.exists() or options.picture.read_text() != svg:
        print(f"{options.picture} is out of date; write it with: python -m tools.draw_pattern")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
