"""Shapes of the hand-written pictures: the same bytes everywhere, and nothing to install."""

BLUE, ORANGE, GREEN, GREY = "#4263eb", "#f59f00", "#0ca678", "#e9ecef"
CELL = 26


def svg(width: int, height: int, parts: list[str]) -> str:
    """A picture with a white background."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="sans-serif" font-size="13">'
    )
    background = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, background, *parts, "</svg>", ""])


def box(x: int, y: int, width: int, height: int, colour: str) -> str:
    """A rectangle."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}" '
        f'fill-opacity="0.6"/>'
    )


def text(x: int, y: int, words: str) -> str:
    """A line of text that begins at x."""
    return f'<text x="{x}" y="{y}">{words}</text>'


def arrow(x: int, y: int, x_end: int, y_end: int) -> str:
    """A line with a dot at its end."""
    line = f'<line x1="{x}" y1="{y}" x2="{x_end}" y2="{y_end}" stroke="#495057" stroke-width="2"/>'
    return line + f'<circle cx="{x_end}" cy="{y_end}" r="4" fill="#495057"/>'
