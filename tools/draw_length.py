"""Draw wall clock against length, the first picture of the README: `python -m tools.draw_length`.

Every point comes from `benchmarks/results/length.json`. The SVG is written by hand, as that of
`tools.draw_pattern` is. Its background is white, because an image does not know the theme of the
page around it.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from tools.benchmark_table import RESULTS, duration, positions

PICTURE = Path(__file__).parent.parent / "docs" / "images" / "length.svg"
DILATED, DENSE, INK, GRID = "#3b5bdb", "#d9480f", "#343a40", "#dee2e6"
WIDTH, HEIGHT = 520, 400
LEFT, RIGHT, TOP, BOTTOM = 66, 82, 62, 52
TICKS_S = (1e-4, 1e-3, 1e-2, 1e-1, 1, 10, 60, 600, 3600, 36_000, 360_000)


def draw(result: dict[str, Any]) -> str:
    """Both curves of the forward pass on logarithmic axes, the extrapolated part dashed."""
    rows = [row for row in result["rows"] if row["part"] == "forward"]
    lengths = [row["seq_len"] for row in rows]
    seconds = [row[name]["best_s"] for row in rows for name in ("dilated", "dense")]
    lowest = max(tick for tick in TICKS_S if tick <= min(seconds))
    highest = max(seconds) * 1.6

    def x(seq_len: int) -> float:
        share = math.log(seq_len / lengths[0]) / math.log(lengths[-1] / lengths[0])
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(second: float) -> float:
        share = math.log(second / lowest) / math.log(highest / lowest)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def line(name: str, part: list[dict[str, Any]], colour: str, style: str = "") -> str:
        points = " ".join(f"{x(row['seq_len'])},{y(row[name]['best_s'])}" for row in part)
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="3"{style}/>'
        )

    def dots(name: str, part: list[dict[str, Any]], colour: str) -> list[str]:
        return [
            f'<circle cx="{x(row["seq_len"])}" cy="{y(row[name]["best_s"])}" r="4.5" '
            f'fill="{colour}"/>'
            for row in part
        ]

    measured = [row for row in rows if not row["dense"]["extrapolated"]]
    beyond = rows[len(measured) - 1 :]
    last, middle = rows[-1], rows[len(rows) // 2]
    ratio = last["dense"]["best_s"] / last["dilated"]["best_s"]
    environment = result["environment"]
    title = "Time of one forward pass against length"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="15" '
        f'fill="{INK}" role="img">',
        f"<title>{title}: {_summary(last)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        f'<text x="16" y="26" font-size="17" font-weight="bold">{title}</text>',
        f'<text x="16" y="46" font-size="14">causal, {last["num_heads"]} heads of '
        f"{last['head_dim']}, {environment['cores']} CPU cores; both axes logarithmic</text>",
    ]
    for tick in TICKS_S:
        if lowest <= tick <= highest:
            lines.append(
                f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick)}" y2="{y(tick)}" '
                f'stroke="{GRID}"/>'
            )
            lines.append(
                f'<text x="{LEFT - 8}" y="{y(tick) + 5:.1f}" text-anchor="end">'
                f"{duration(tick)}</text>"
            )
    for seq_len in lengths:
        lines.append(
            f'<text x="{x(seq_len)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
            f"{positions(seq_len)}</text>"
        )
    lines.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"positions</text>"
    )
    lines += [line("dense", measured, DENSE), *dots("dense", measured, DENSE)]
    if len(beyond) > 1:
        lines.append(line("dense", beyond, DENSE, ' stroke-dasharray="7 6"'))
        lines.append(
            _label(x(last["seq_len"]) - 72, y(last["dense"]["best_s"]) + 6, "extrapolated", DENSE)
        )
    lines += [line("dilated", rows, DILATED), *dots("dilated", rows, DILATED)]
    lines += [
        _label(x(middle["seq_len"]) - 78, y(middle["dense"]["best_s"]), "dense attention", DENSE),
        _label(
            x(middle["seq_len"]) + 74,
            y(middle["dilated"]["best_s"]) + 26,
            "dilated attention",
            DILATED,
        ),
    ]
    for name, colour in (("dense", DENSE), ("dilated", DILATED)):
        lines.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{y(last[name]["best_s"]) + 5:.1f}" fill="{colour}" '
            f'font-weight="bold">{duration(last[name]["best_s"])}</text>'
        )
    about = "≈ " if last["dense"]["extrapolated"] else ""
    between = math.sqrt(last["dense"]["best_s"] * last["dilated"]["best_s"])
    lines.append(
        f'<text x="{WIDTH - RIGHT + 10}" y="{y(between) + 5:.1f}">{about}{_rounded(ratio)} ×</text>'
    )
    return "\n".join([*lines, "</svg>", ""])


def _label(x: float, y: float, text: str, colour: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{colour}" '
        f'font-weight="bold" stroke="#ffffff" stroke-width="6" paint-order="stroke">{text}</text>'
    )


def _summary(row: dict[str, Any]) -> str:
    """The longest row in words."""
    dense = "extrapolated" if row["dense"]["extrapolated"] else "measured"
    return (
        f"at {row['seq_len']:,} positions dilated attention takes "
        f"{duration(row['dilated']['best_s'])} and dense attention "
        f"{duration(row['dense']['best_s'])} ({dense})"
    )


def _rounded(ratio: float) -> str:
    """Two digits: a timing is not better than that."""
    return f"{float(f'{ratio:.2g}'):,.0f}"


def main(arguments: list[str] | None = None) -> int:
    """Write the picture, or with `--check` compare it with the one on disk."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the picture is out of date")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    svg = draw(json.loads((options.results / "length.json").read_text()))
    if not options.check:
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        options.picture.write_text(svg)
    elif not options.picture.exists() or options.picture.read_text() != svg:
        print(f"{options.picture} is out of date; write it with: python -m tools.draw_length")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
