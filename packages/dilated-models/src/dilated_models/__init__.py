"""LongNet language models on exact dilated attention.

`LongNetConfig` says what a model is, `LongNetLM` is the model, and the `dilated` command trains,
evaluates and generates (extra `cli`).
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_models.longnet.config import LongNetConfig
    from dilated_models.longnet.language_model import LongNetLM

__version__ = _version("dilated-models")

__all__ = ["LongNetConfig", "LongNetLM"]

# Loaded on first use, so that `dilated --help` need not wait for torch.
_MODULES = {
    "LongNetConfig": "dilated_models.longnet.config",
    "LongNetLM": "dilated_models.longnet.language_model",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
