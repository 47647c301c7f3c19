"""Numbers with units in the documentation have a source, and the check sees those without."""

import json

import pytest

from tools import check_numbers
from tools.packages import ROOT


@pytest.fixture
def check(tmp_path):
    """Problems of a page with some text, beside some entries of numbers.toml."""

    def run(text, entries=""):
        (tmp_path / "docs").mkdir(exist_ok=True)
        (tmp_path / "docs" / "page.md").write_text(text)
        (tmp_path / "docs" / "numbers.toml").write_text(entries)
        return check_numbers.problems(tmp_path)

    run.root = tmp_path
    return run


def entry(text, **facts):
    lines = [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
    return "\n".join(["[[number]]", 'page = "docs/page.md"', f"text = {json.dumps(text)}", *lines])


def test_every_number_here_has_a_source():
    assert check_numbers.problems(ROOT) == []


@pytest.mark.parametrize(
    "number",
    [
        "2.9 times",
        "12 GB",
        "90 %",
        "3×",
        "3 ×",
        "1,856 ms",
        "0.5 s",
        "five minutes",
        "1.97 bits",
        "5 µs",
    ],
)
def test_a_number_without_a_source_is_found(check, number):
    (problem,) = check(f"Some words.\nIt takes {number}, or so.")
    assert problem.startswith(f"docs/page.md:2: {number!r} has no source")


@pytest.mark.parametrize(
    "text",
    [
        "Compute capability 10.x, version 2.15.0, and 2 × 4 ranks of 8 heads.",
        "```bash\nsleep 5 s  # 5 s\n```",
        "Call `wait(5 s)` or see [the page](https://example.org/takes-5 s).",
        "<!-- python -m tools.some_table writes this table -->\n| 5 s |\n<!-- end -->\n",
        "<!-- python -m tools.some_table writes this: one_of_two -->\n| 5 s |\n<!-- end -->\n",
    ],
)
def test_shapes_code_and_generated_tables_are_left_out(check, text):
    assert check(text) == []


def test_a_source_in_words_covers_its_text_over_a_line_break(check):
    page = "It takes 5 s\nat most, and then 5 s more."
    (problem,) = check(page, entry("takes 5 s at most", source="a limit"))
    assert problem.startswith("docs/page.md:2: '5 s' has no source")
    assert check(page.replace("5 s more", "more"), entry("takes 5 s at most", source="x")) == []


def test_a_result_that_changed_is_found(check):
    (check.root / "result.json").write_text('{"rows": [{"seconds": 200}, {"seconds": 310}]}')
    facts = {"result": "result.json", "low": 60, "high": 300}
    assert check("Takes 5 min.", entry("5 min", **facts, value="rows.0.seconds")) == []
    (problem,) = check("Takes 5 min.", entry("5 min", **facts, value="rows.*.seconds"))
    assert "result.json has 310 at rows.*.seconds; it must be from 60 to 300" in problem
    (problem,) = check("Takes 5 min.", entry("5 min", **facts, value="rows.*.other"))
    assert "result.json has nothing at rows.*.other" in problem


def test_a_line_of_code_that_changed_is_found(check):
    (check.root / "code.py").write_text("LIMIT = 6\n")
    assert check("In 6 s.", entry("6 s", file="code.py", contains="LIMIT = 6")) == []
    (problem,) = check("In 5 s.", entry("5 s", file="code.py", contains="LIMIT = 5"))
    assert "code.py no longer has 'LIMIT = 5'; change the page." in problem


def test_entries_that_cover_nothing_are_found(check):
    (problem,) = check("No number.", entry("5 s", source="x"))
    assert "docs/page.md no longer has '5 s'; remove it." in problem
    (problem,) = check("In 5 s.", entry("5 s", source="x", file="y"))
    assert "it must have one of result, file and source." in problem
    missing = entry("5 s", source="x").replace("page.md", "gone.md")
    assert any("there is no page 'docs/gone.md'" in problem for problem in check("", missing))
