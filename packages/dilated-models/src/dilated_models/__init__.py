"""LongNet models on exact dilated attention: language models, and encoders of slides.

`LongNetConfig` describes a model and `LongNetLM` is the model. The `dilated` command (extra `cli`)
trains models, scores texts and generates; `load_model`, `evaluate` and `generate` do the same from
Python. `GenerationCache` lets a model continue texts of any length in bounded memory.

`LongNet` reads two sequences, a source and a target, and `generate_from` draws targets.
`LongNetEncoder` maps embeddings to contextual ones, and `LongNetSlideEncoder` the tiles of a slide
to one embedding. `dilated_models.checkpoints` loads published weights.

Inside: `config`; above it `text` (bytes and tokens), `layers` (the parts of a block) and `encoder`
(a stack of layers); above them `longnet` (the language model and its files) and `slide` (the slide
encoder), then `checkpoints`, then `planning` (what a model needs on some devices), then `training`,
then `cli`. Each stands on those below it.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_models.config import LongNetConfig
    from dilated_models.encoder.decoder_layer import DilatedTransformerDecoderLayer
    from dilated_models.encoder.layer import DilatedTransformerEncoderLayer
    from dilated_models.encoder.stack import LongNetEncoder
    from dilated_models.layers.context_parallel import ContextParallel
    from dilated_models.longnet.encoder_decoder import LongNet
    from dilated_models.longnet.encoder_decoder_config import EncoderDecoderConfig
    from dilated_models.longnet.generation import generate, generate_batch, generate_from
    from dilated_models.longnet.generation_cache import GenerationCache
    from dilated_models.longnet.language_model import LongNetLM
    from dilated_models.longnet.saving import load_model
    from dilated_models.planning.plan import plan
    from dilated_models.slide.encoder import LongNetSlideEncoder
    from dilated_models.training.evaluation import evaluate

__version__ = _version("dilated-models")

__all__ = [
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

# Loaded on first use: `dilated --help` does not wait for torch.
_MODULES = {
    "ContextParallel": "dilated_models.layers.context_parallel",
    "DilatedTransformerDecoderLayer": "dilated_models.encoder.decoder_layer",
    "DilatedTransformerEncoderLayer": "dilated_models.encoder.layer",
    "EncoderDecoderConfig": "dilated_models.longnet.encoder_decoder_config",
    "GenerationCache": "dilated_models.longnet.generation_cache",
    "LongNet": "dilated_models.longnet.encoder_decoder",
    "LongNetConfig": "dilated_models.config",
    "LongNetEncoder": "dilated_models.encoder.stack",
    "LongNetLM": "dilated_models.longnet.language_model",
    "LongNetSlideEncoder": "dilated_models.slide.encoder",
    "evaluate": "dilated_models.training.evaluation",
    "generate": "dilated_models.longnet.generation",
    "generate_batch": "dilated_models.longnet.generation",
    "generate_from": "dilated_models.longnet.generation",
    "load_model": "dilated_models.longnet.saving",
    "plan": "dilated_models.planning.plan",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
