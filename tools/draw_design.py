"""Draw the pictures of docs/design.md: `python -m tools.draw_design`.

Rows and caches come from the plans that the code makes. The SVG is written by hand: the same bytes
everywhere, and nothing to install.
"""

import argparse
import sys
from pathlib import Path

import torch
from dilated_core import DecodingCache, DilatedPattern, Span, plan_problems

IMAGES = Path(__file__).parent.parent / "docs" / "images"
BLUE, ORANGE, GREEN, GREY = "#4263eb", "#f59f00", "#0ca678", "#e9ecef"
CELL = 26


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
    parts = [_text(20, 24, "w = 8, r = 4: position → right, head → down")]
    for head in range(num_heads):
        parts.append(_text(20, 58 + head * CELL, f"head {head}"))
        for position in range(seq_len):
            segment = segment_of.get(position * num_heads + head)
            colour = GREY if segment is None else (BLUE, ORANGE)[segment]
            parts.append(_box(80 + position * CELL, 40 + head * CELL, CELL - 2, CELL - 2, colour))
    size, stride = tuple(view.shape[:3]), view.stride()[:3]
    below = 40 + num_heads * CELL + 22
    parts.append(_text(20, below, f"one view: (segments, rows, heads) = {size}"))
    parts.append(_text(20, below + 22, f"its strides, in rows of head_dim numbers: {stride}"))
    return _svg(520, below + 40, parts)


def merge() -> str:
    """Two partials into one result, and backward from it."""
    parts: list[str] = []
    for i, colour in enumerate((BLUE, ORANGE)):
        top = 20 + 70 * i
        parts += [_box(20, top, 150, 44, colour), _text(34, top + 27, f"strip {i + 1}: forward")]
        parts += [_text(190, top + 27, f"out_{i + 1}, lse_{i + 1}"), _arrow(285, top + 22, 330, 76)]
    parts += [_box(335, 40, 290, 72, GREEN)]
    parts += [_text(347, 66, "lse = log(exp lse_1 + exp lse_2)")]
    parts += [_text(347, 92, "out = Σ exp(lse_i − lse) · out_i")]
    parts += [_text(335, 138, "saved once: out, lse"), _arrow(480, 146, 480, 176)]
    for i, colour in enumerate((BLUE, ORANGE)):
        top = 180 + 70 * i
        parts += [_box(20, top, 605, 44, colour)]
        formula = "p = exp(score − lse), ds = p · (dout·v − delta)"
        parts += [_text(34, top + 27, f"strip {i + 1}: backward with out, lse:  {formula}")]
    parts += [_text(20, 326, "delta = rowsum(dout · out); dq, dk and dv are sums over the strips")]
    return _svg(650, 344, parts)


def cache() -> str:
    """The rows of a cache, and which position each holds after 21 tokens."""
    pattern, count = DilatedPattern([4, 16], [1, 4]), 21
    holder = DecodingCache(pattern, batch_size=1, num_heads=1, head_dim=1)
    for token in torch.arange(float(count)).view(count, 1, 1, 1, 1):
        holder.prefill(token, token)
    rows = [int(x) for x in holder.values.flatten()]
    parts = [
        _text(20, 24, f"after {count} tokens, one head: the position in each row of the cache")
    ]
    first = 0
    for i, (w, r) in enumerate(pattern.branches):
        top = 44 + 56 * i
        parts.append(_text(20, top + 18, f"w = {w}, r = {r}"))
        start = count // w * w
        for j in range(-(-w // r)):
            held = rows[first + j]
            is_current = start <= held < count
            x = 120 + j * 52
            parts.append(_box(x, top, 48, CELL, (BLUE, ORANGE)[i] if is_current else GREY))
            parts.append(_text(x + 14, top + 18, str(held)))
        first += -(-w // r)
    parts.append(_text(20, 170, "grey: left from the segment before, not read, overwritten next"))
    return _svg(520, 188, parts)


PICTURES = {"strip.svg": strip, "merge.svg": merge, "cache.svg": cache}


def _svg(width: int, height: int, parts: list[str]) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])


def _box(x: int, y: int, width: int, height: int, colour: str) -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}" '
        f'fill-opacity="0.6"/>'
    )


def _text(x: int, y: int, text: str) -> str:
    return f'<text x="{x}" y="{y}">{text}</text>'


def _arrow(x: int, y: int, x_end: int, y_end: int) -> str:
    line = f'<line x1="{x}" y1="{y}" x2="{x_end}" y2="{y_end}" stroke="#495057" stroke-width="2"/>'
    return line + f'<circle cx="{x_end}" cy="{y_end}" r="4" fill="#495057"/>'


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
