"""Hugging Face transformers with dilated attention; needs the extra `huggingface`.

`register_with_transformers()` makes `attn_implementation="dilated"` known, for the models that
transformers has: Llama, Qwen, GPT-2, BERT and others like them. `dilated_pattern` chooses the
pattern inside a `with`, where a model's config does not hold it.

`DilatedCache` is a cache for such models whose memory does not grow with the text.

`LongNetForCausalLM` and `LongNetModel` are `LongNetLM` as models of transformers. Importing one of
them makes them known to the Auto classes.

Inside: `pattern` (which pattern a layer has) and `refusals` (what cannot be honoured); `columns`
(which columns of a batch are which sequences); `attention` and `masks`, the two functions that
transformers calls; `registration`; `dilated_cache`. `configuration`, `bounded_cache` and `models`
are LongNet.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_models.huggingface.configuration import LongNetPretrainedConfig
    from dilated_models.huggingface.dilated_cache import DilatedCache
    from dilated_models.huggingface.models import LongNetForCausalLM, LongNetModel
    from dilated_models.huggingface.pattern import dilated_pattern
    from dilated_models.huggingface.registration import register_with_transformers

__all__ = [
    "DilatedCache",
    "LongNetForCausalLM",
    "LongNetModel",
    "LongNetPretrainedConfig",
    "dilated_pattern",
    "register_with_transformers",
]

# Loaded on first use: what defines models imports transformers.
_MODULES = {
    "DilatedCache": "dilated_models.huggingface.dilated_cache",
    "LongNetForCausalLM": "dilated_models.huggingface.models",
    "LongNetModel": "dilated_models.huggingface.models",
    "LongNetPretrainedConfig": "dilated_models.huggingface.models",  # registers it too
    "dilated_pattern": "dilated_models.huggingface.pattern",
    "register_with_transformers": "dilated_models.huggingface.registration",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
