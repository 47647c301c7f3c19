"""The site: every page is in the navigation, and nothing comes from another server."""

import tomllib

import pytest

from tools.check_site import loaded_from_elsewhere
from tools.packages import ROOT, find_packages


def _pages(nav):
    for entry in nav:
        for target in entry.values():
            yield from [target] if isinstance(target, str) else _pages(target)


def test_every_page_is_in_the_navigation_once_and_on_the_first_page():
    nav = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]
    pages = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    reference = sorted(f"reference/{package}.md" for package in find_packages(ROOT))
    assert sorted(_pages(nav)) == sorted([*pages, *reference])
    first = (ROOT / "docs" / "index.md").read_text()
    assert [page for page in pages if f"({page})" not in first] == ["index.md"]


@pytest.mark.parametrize(
    ("name", "text", "count"),
    [
        ("index.html", '<script src="https://example.org/a.js"></script>', 1),
        ("index.html", "<link rel=stylesheet href=//example.org/a.css><img src=a.png>", 1),
        ("index.html", '<a href="https://example.org">read</a> <img src="images/a.svg">', 0),
        ("a.css", "@font-face {src: url(https://example.org/a.woff)}", 1),
        ("a.css", "a {background: url(data:image/png;base64,AA)}", 0),
    ],
)
def test_what_a_page_loads_from_another_server_is_found(tmp_path, name, text, count):
    (tmp_path / name).write_text(text)
    assert len(list(loaded_from_elsewhere(tmp_path))) == count
