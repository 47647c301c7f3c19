import importlib
import textwrap
from pathlib import Path

import pytest

from tools.check_api import api_problems, listing, public_modules
from tools.packages import find_packages

SOURCE = '''
"""A package."""
__all__ = ["Pattern", "attend", "LIMIT"]
LIMIT = 3


class Pattern:
    """A pattern."""

    def __init__(self, rate: int, *, offset: str = "blocked") -> None:
        self._rate = rate

    @property
    def rate(self) -> int:
        return self._rate

    @classmethod
    def dense(cls, size: "int | None" = None) -> "Pattern":
        return cls(1)

    def _hidden(self) -> None: ...


def attend(q: int, /, k: float = 0.5, *more: str, scale: "float | None" = None) -> None: ...


def private() -> None: ...
'''
EXPECTED = """\
[{module}]
LIMIT
class Pattern(rate, *, offset='blocked')
    Pattern.dense(cls, size=None)
    Pattern.rate
attend(q, /, k=0.5, *more, scale=None)
"""


def test_the_listing_has_the_public_names_and_their_arguments(
    tmp_path: Path, make_package, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_package("api-sample")
    (folder / "src/api_sample/__init__.py").write_text(SOURCE)
    (folder / "src/api_sample/inner.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(folder / "src")
    importlib.invalidate_caches()
    text = listing(find_packages(tmp_path)["api-sample"])
    assert text == EXPECTED.format(module="api_sample")


def test_public_modules_are_those_with_a_list_of_names(tmp_path: Path) -> None:
    files = {
        "a/__init__.py": "__all__ = []",
        "a/b.py": "__all__: list[str] = []",
        "a/c.py": "def f():\n    __all__ = []",
        "a/d/__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(text))
    assert public_modules(tmp_path) == ["a", "a.b"]


def test_lost_new_and_changed_names_are_reported() -> None:
    assert api_problems("a", "[a]\nf(x)\n", "[a]\nf(x)\n") == []
    problems = api_problems("a", "[a]\nf(x)\ng\n", "[a]\nf(x, y)\ng\n")
    assert problems == ["a: f(x) is gone", "a: f(x, y) is new"]
    assert api_problems("a", "", "[a]\n") == ["a: [a] is new"]
