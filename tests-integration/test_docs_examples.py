"""Every Python block of the README files and the documentation runs as it is printed."""

from pathlib import Path

import pytest

from tools.packages import ROOT
from tools.page_examples import run_page

PAGES = [
    *(ROOT / "README.md", *ROOT.glob("packages/*/README.md")),
    # docs/reference is generated from docstrings, whose examples are doctests.
    *(page for page in ROOT.glob("docs/**/*.md") if page.parent.name != "reference"),
]


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
    assert run_page(page)[0] == 2


def test_a_failing_block_is_an_error_at_its_own_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as error:
        run_page(page)
    assert error.traceback[-1].lineno == 4  # counted from 0


def test_only_a_mark_with_a_reason_leaves_a_block_out(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- no-run: needs two GPUs -->\n```python\n1 / 0\n```\n")
    assert run_page(page)[0] == 0
    page.write_text("<!-- no-run: -->\n```python\n1 / 0\n```\n")
    with pytest.raises(ValueError, match="needs a reason"):
        run_page(page)
