"""Every Python block of the README files and the documentation runs as it is printed.

The blocks of a page run from top to bottom in one namespace, as a reader would type them. A line
`<!-- no-run: reason -->` before a block leaves it out.
"""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.packages import ROOT

PAGES = [ROOT / "README.md", *ROOT.glob("packages/*/README.md"), *ROOT.glob("docs/**/*.md")]
BLOCK = re.compile(
    r"^(?:<!-- no-run:(?P<reason>.*)-->\n\n?)?"
    r"(?P<indent> *)```py.*\n(?P<code>(?:.*\n)*?)(?P=indent)```$",
    re.MULTILINE,
)


def blocks_to_run(text: str) -> Iterator[str]:
    """The Python blocks of a page, each after as many empty lines as precede it there."""
    for block in BLOCK.finditer(text):
        reason = block["reason"]
        if reason is None:
            lines_before = text.count("\n", 0, block.start("code"))
            yield "\n" * lines_before + textwrap.dedent(block["code"])
        elif not reason.strip():
            raise ValueError("a no-run mark needs a reason: <!-- no-run: reason -->")


def run_page(page: Path) -> int:
    """Run the blocks of a page and return how many there were."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = list(blocks_to_run(page.read_text(encoding="utf-8")))
    for code in blocks:
        exec(compile(code, page, "exec"), namespace)  # a traceback shows the page's own lines
    return len(blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_blocks_share_names_and_other_languages_are_left_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nx = 1\n```\n\n```bash\nexit 1\n```\n\n"
        "1. In a list:\n\n    ```py title='a.py'\n    assert x == 1\n    ```\n"
    )
    assert run_page(page) == 2


def test_a_failing_block_is_an_error_at_its_own_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run_page(page)
    assert error.traceback[-1].lineno == 4  # counted from 0


def test_only_a_mark_with_a_reason_leaves_a_block_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: needs two GPUs -->\n```python\n1 / 0\n```\n")
    assert run_page(page) == 0
    page.write_text("<!-- no-run: -->\n```python\n1 / 0\n```\n")
    with pytest.raises(ValueError, match="needs a reason"):
        run_page(page)
