"""The Python blocks of a page, as tests run them.

The blocks of a page run from top to bottom in one namespace, as a reader would type them. A line
`<!-- no-run: reason -->` before a block leaves it out.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK = re.compile(
    r"^(?:<!-- no-run:(?P<reason>.*)-->\n\n?)?"
    r"(?P<indent> *)```py(?!con).*\n(?P<code>(?:.*\n)*?)(?P=indent)```$",
    re.MULTILINE,
)


def run_page(page: Path) -> tuple[int, dict[str, Any]]:
    """Run the blocks of a page; return how many there were and the names that they defined."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    blocks = list(_blocks_to_run(page.read_text(encoding="utf-8")))
    for code in blocks:
        exec(compile(code, page, "exec"), namespace)  # a traceback shows the page's own lines
    return len(blocks), namespace


def _blocks_to_run(text: str) -> Iterator[str]:
    """The Python blocks of a page, each after as many empty lines as precede it there.

    Raises:
        ValueError: If a `no-run` mark has no reason.
    """
    for block in _BLOCK.finditer(text):
        reason = block["reason"]
        if reason is None:
            lines_before = text.count("\n", 0, block.start("code"))
            yield "\n" * lines_before + textwrap.dedent(block["code"])
        elif not reason.strip():
            raise ValueError("a no-run mark needs a reason: <!-- no-run: reason -->")
