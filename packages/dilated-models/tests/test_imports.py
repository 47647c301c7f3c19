"""The public names, and the examples in docstrings."""

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


def test_the_public_names() -> None:
    assert dilated_models.__all__ == [
        "ContextParallel",
        "DilatedTransformerDecoderLayer",
        "DilatedTransformerEncoderLayer",
        "EncoderDecoderConfig",
        "GenerationCache",
        "LongNet",
        "LongNetConfig",
        "LongNetEncoder",
        "LongNetLM",
        "LongNetSlideEncoder",
        "evaluate",
        "generate",
        "generate_batch",
        "generate_from",
        "load_model",
        "plan",
    ]
    assert set(dilated_models.__all__) <= set(dir(dilated_models))
    for name in dilated_models.__all__:
        assert getattr(dilated_models, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'LongNetXL'"):
        dilated_models.LongNetXL  # noqa: B018


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    with_examples = [t for m in modules for t in finder.find(m) if t.examples]
    assert len(with_examples) >= 6
