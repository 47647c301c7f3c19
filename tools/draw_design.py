"""Draw the pictures of docs/design.md and docs/context-parallel.md: `python -m tools.draw_design`.

Rows, caches and messages come from the plans that the code makes.
"""

import argparse
import sys
from pathlib import Path

import torch
from dilated_core import DecodingCache, DilatedPattern, Span, plan_problems

from tools import draw_ring
from tools.svg import BLUE, CELL, GREEN, GREY, ORANGE, arrow, box, svg, text

IMAGES = Path(__file__).parent.parent / "docs" / "images"


def strip() -> str:
    """Four heads of one branch: the cells of the view, numbered in the order of memory."""
    seq_len, num_heads = 16, 4
    (problem,) = plan_problems(
        DilatedPattern([8], [4]),
        queries=Span(0, seq_len),
        keys=Span(0, seq_len),
        seq_len=seq_len,
        num_heads=num_heads,
    )
    places = torch.arange(seq_len * num_heads).view(1, seq_len, num_heads, 1)
    view = problem.queries.view(places)
    segment_of = {int(place): n for n, segment in enumerate(view) for place in segment.flatten()}
    parts = [text(20, 24, "w = 8, r = 4: position → right, head → down")]
    for head in range(num_heads):
        parts.append(text(20, 58 + head * CELL, f"head {head}"))
        for position in range(seq_len):
            segment = segment_of.get(position * num_heads + head)
            colour = GREY if segment is None else (BLUE, ORANGE)[segment]
            parts.append(box(80 + position * CELL, 40 + head * CELL, CELL - 2, CELL - 2, colour))
    size, stride = tuple(view.shape[:3]), view.stride()[:3]
    below = 40 + num_heads * CELL + 22
    parts.append(text(20, below, f"one view: (segments, rows, heads) = {size}"))
    parts.append(text(20, below + 22, f"its strides, in rows of head_dim numbers: {stride}"))
    return svg(520, below + 40, parts)


def merge() -> str:
    """Two partials into one result, and backward from it."""
    parts: list[str] = []
    for i, colour in enumerate((BLUE, ORANGE)):
        top = 20 + 70 * i
        parts += [box(20, top, 150, 44, colour), text(34, top + 27, f"strip {i + 1}: forward")]
        parts += [text(190, top + 27, f"out_{i + 1}, lse_{i + 1}"), arrow(285, top + 22, 330, 76)]
    parts += [box(335, 40, 290, 72, GREEN)]
    parts += [text(347, 66, "lse = log(exp lse_1 + exp lse_2)")]
    parts += [text(347, 92, "out = Σ exp(lse_i − lse) · out_i")]
    parts += [text(335, 138, "saved once: out, lse"), arrow(480, 146, 480, 176)]
    for i, colour in enumerate((BLUE, ORANGE)):
        top = 180 + 70 * i
        parts += [box(20, top, 605, 44, colour)]
        formula = "p = exp(score − lse), ds = p · (dout·v − delta)"
        parts += [text(34, top + 27, f"strip {i + 1}: backward with out, lse:  {formula}")]
    parts += [text(20, 326, "delta = rowsum(dout · out); dq, dk and dv are sums over the strips")]
    return svg(650, 344, parts)


def cache() -> str:
    """The rows of a cache, and which position each holds after 21 tokens."""
    pattern, count = DilatedPattern([4, 16], [1, 4]), 21
    holder = DecodingCache(pattern, batch_size=1, num_heads=1, head_dim=1)
    for token in torch.arange(float(count)).view(count, 1, 1, 1, 1):
        holder.prefill(token, token)
    rows = [int(x) for x in holder.values.flatten()]
    parts = [text(20, 24, f"after {count} tokens, one head: the position in each row of the cache")]
    first = 0
    for i, (w, r) in enumerate(pattern.branches):
        top = 44 + 56 * i
        parts.append(text(20, top + 18, f"w = {w}, r = {r}"))
        start = count // w * w
        for j in range(-(-w // r)):
            held = rows[first + j]
            is_current = start <= held < count
            x = 120 + j * 52
            parts.append(box(x, top, 48, CELL, (BLUE, ORANGE)[i] if is_current else GREY))
            parts.append(text(x + 14, top + 18, str(held)))
        first += -(-w // r)
    parts.append(text(20, 170, "grey: left from the segment before, not read, overwritten next"))
    return svg(520, 188, parts)


PICTURES = {
    "strip.svg": strip,
    "merge.svg": merge,
    "cache.svg": cache,
    "layouts.svg": draw_ring.layouts,
    "exchange.svg": draw_ring.exchange,
}


def main(arguments: list[str] | None = None) -> int:
    """Write the pictures, or with `--check` compare them with those on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if a picture is out of date")
    parser.add_argument("--folder", type=Path, default=IMAGES)
    options = parser.parse_args(arguments)
    status = 0
    for name, draw in PICTURES.items():
        picture = options.folder / name
        if not options.check:
            picture.write_text(draw(), encoding="utf-8")
        elif not picture.exists() or picture.read_text(encoding="utf-8") != draw():
            print(f"{picture} is out of date; write it with: python -m tools.draw_design")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
