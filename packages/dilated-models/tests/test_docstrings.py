"""The examples in docstrings run, and say what they show."""

import doctest
import importlib
import pkgutil

import dilated_models
import pytest

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(dilated_models.__path__, "dilated_models.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    with_examples = [t for m in modules for t in finder.find(m) if t.examples]
    assert len(with_examples) >= 6
