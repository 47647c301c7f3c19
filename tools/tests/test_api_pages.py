"""The API reference has every public name, with its docstring as Markdown."""

import re

import pytest

from tools.api_pages import markdown, page, read_modules
from tools.packages import ROOT, find_packages

PACKAGES = find_packages(ROOT)
DOCSTRING = """Add numbers.

Exactly.

Args:
    a: First number,
        of any size.
    b, c: Others.

Returns:
    The sum.

Raises:
    TypeError: If one is no number.

Example:
    >>> add(1, 2, 3)
    6
"""


def test_google_sections_become_lists_and_blocks():
    assert markdown(DOCSTRING).split("\n") == [
        *("Add numbers.", "", "Exactly.", "", ""),
        *("**Args**", "", "- `a`: First number,", "    of any size.", "- `b, c`: Others.", "", ""),
        *("**Returns**", "", "The sum.", "", ""),
        *("**Raises**", "", "- `TypeError`: If one is no number.", "", ""),
        *("**Example**", "", "```pycon", ">>> add(1, 2, 3)", "6", "```"),
    ]


def test_an_example_ends_where_the_next_section_begins():
    text = (
        "Add.\n\nExample::\n\n    # On each rank.\n    add(1, 2)\n\nArgs:\n    a: First.\n\nMore."
    )
    assert markdown(text).split("\n") == [
        *("Add.", "", "", "**Example**", ""),
        *("```python", "# On each rank.", "add(1, 2)", "```", ""),
        *("", "**Args**", "", "- `a`: First.", "", "More."),
    ]


@pytest.mark.parametrize("package", PACKAGES.values(), ids=PACKAGES)
def test_every_public_name_is_on_its_page(package):
    modules = read_modules(package)
    text = page(package, modules, {"dilated_attention": "dilated-core"})
    # Every second part is a block of code, if each block that begins also ends.
    outside_of_code = "".join(re.split(r"^```.*$", text, flags=re.MULTILINE)[::2])
    for entries in modules.values():
        for entry in entries:
            assert f"### {entry.name} {{ #{entry.name} }}" in outside_of_code
            assert entry.definition is not None or not entry.signature, entry.name


def test_names_become_links_outside_of_code():
    package = PACKAGES["dilated-core"]
    text = page(package, read_modules(package), {"merge_partials": "dilated-core", "generate": "x"})
    assert "[`merge_partials`](#merge_partials) merges partial results" in text
    assert "\n>>> merge_partials([a, b]).out\n" in text


def test_a_long_signature_has_an_argument_per_line():
    package = PACKAGES["dilated-core"]
    text = page(package, read_modules(package), {})
    assert (
        "\ndilated_attention(\n    q,\n    k,\n    v,\n    pattern,\n    *,\n    is_causal=F"
        in text
    )
    assert "class Branch(segment_length, dilation_rate)\n" in text
    assert "**unknown" not in text
