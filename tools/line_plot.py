"""A plot of lines as SVG by hand, like the other pictures: the same bytes everywhere."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = ("#3b5bdb", "#d9480f", "#2b8a3e", "#9c36b5", "#0c8599", "#868e96")
INK, GRID = "#343a40", "#dee2e6"
WIDTH, HEIGHT = 620, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 170, 56, 52


class Point(NamedTuple):
    """A value and its spread.

    Attributes:
        x: Place, in units of the horizontal axis.
        y: The value.
        low: The least of its spread.
        high: The largest of its spread.
        is_extrapolated: Whether it was not measured; the line to it is dashed.
    """

    x: float
    y: float
    low: float
    high: float
    is_extrapolated: bool = False


class Tick(NamedTuple):
    """A place of an axis and its label."""

    place: float
    label: str


def line_plot(
    title: str,
    subtitle: str,
    lines: dict[str, Sequence[Point]],
    *,
    x_ticks: Sequence[Tick],
    y_ticks: Sequence[Tick],
    x_label: str,
    logarithmic: tuple[bool, bool] = (False, False),
) -> str:
    """Lines with their spread as a band, each named at its right end.

    Args:
        title: First line of text.
        subtitle: Second one: units, and what the band is.
        lines: By name, at most as many as `COLOURS`.
        x_ticks: Labels of the horizontal axis; the first and the last bound it.
        y_ticks: The same of the vertical axis; lines go across at each.
        x_label: What the horizontal axis is.
        logarithmic: Of the horizontal and the vertical axis.
    """
    x_log, y_log = logarithmic
    points = [point for line in lines.values() for point in line]
    y_bounds = [*(p.low for p in points), *(p.high for p in points), *(t.place for t in y_ticks)]
    x_first, x_last = x_ticks[0].place, x_ticks[-1].place

    def x(value: float) -> float:
        share = _share(value, x_first, x_last, x_log)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = _share(value, min(y_bounds), max(y_bounds), y_log)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="14" '
        f'fill="{INK}" role="img">',
        f"<title>{title}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>',
        f'<text x="16" y="24" font-size="16" font-weight="bold">{title}</text>',
        f'<text x="16" y="43" font-size="13">{subtitle}</text>',
    ]
    for tick in y_ticks:
        parts += [
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick.place)}" y2="{y(tick.place)}" '
            f'stroke="{GRID}"/>',
            f'<text x="{LEFT - 8}" y="{y(tick.place) + 5:.1f}" text-anchor="end">'
            f"{tick.label}</text>",
        ]
    parts += [
        f'<text x="{x(tick.place)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">'
        f"{tick.label}</text>"
        for tick in x_ticks
    ]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 10}" text-anchor="middle">'
        f"{x_label}</text>"
    )
    for colour, line in zip(COLOURS, lines.values(), strict=False):
        band = [f"{x(p.x)},{y(p.low)}" for p in line]
        band += [f"{x(p.x)},{y(p.high)}" for p in reversed(line)]
        parts.append(f'<polygon points="{" ".join(band)}" fill="{colour}" fill-opacity="0.15"/>')
        for before, after in itertools.pairwise(line):
            dashes = ' stroke-dasharray="6 5"' if after.is_extrapolated else ""
            parts.append(
                f'<line x1="{x(before.x)}" y1="{y(before.y)}" x2="{x(after.x)}" '
                f'y2="{y(after.y)}" stroke="{colour}" stroke-width="2.5"{dashes}/>'
            )
        parts += [
            f'<circle cx="{x(p.x)}" cy="{y(p.y)}" r="3.5" fill="{colour}"/>'
            for p in line
            if not p.is_extrapolated
        ]
    names = list(lines)
    for colour, name, height in zip(
        COLOURS, names, _apart([y(lines[name][-1].y) for name in names]), strict=False
    ):
        parts.append(
            f'<text x="{WIDTH - RIGHT + 10}" y="{height + 5:.1f}" fill="{colour}" '
            f'font-weight="bold">{name}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _share(value: float, first: float, last: float, is_logarithmic: bool) -> float:
    if is_logarithmic:
        value, first, last = math.log(value), math.log(first), math.log(last)
    return (value - first) / (last - first)


def _apart(heights: list[float], least: float = 17.0) -> list[float]:
    """The heights, moved so that labels do not cover each other, in the same order."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = [heights[i] for i in order]
    for _ in range(len(moved)):
        for i in range(1, len(moved)):
            gap = moved[i] - moved[i - 1]
            if gap < least:
                moved[i - 1] -= (least - gap) / 2
                moved[i] += (least - gap) / 2
    return [moved[order.index(i)] for i in range(len(heights))]


def round_ticks(low: float, high: float, count: int = 5) -> list[Tick]:
    """Round numbers that span [low, high], for a vertical axis."""
    step = (high - low) / count or 1.0
    magnitude = 10 ** math.floor(math.log10(step))
    step = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= step)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [Tick(i * step, f"{i * step:.6g}") for i in range(first, last + 1)]
