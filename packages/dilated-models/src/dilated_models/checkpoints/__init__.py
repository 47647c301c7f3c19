"""Published weights: read strictly, and built into models.

Every loader takes a state dict or the path of a file, refuses a missing, extra or misshapen weight
by its name, and never leaves a weight random.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dilated_models.checkpoints.decoder import decoder_from_torchscale
    from dilated_models.checkpoints.files import Checkpoint, read_checkpoint
    from dilated_models.checkpoints.longvit import longvit_from_torchscale
    from dilated_models.checkpoints.slide import (
        gigapath_state_dict,
        slide_encoder_from_gigapath,
    )
    from dilated_models.checkpoints.slidechat import encoder_from_slidechat

__all__ = [
    "Checkpoint",
    "decoder_from_torchscale",
    "encoder_from_slidechat",
    "gigapath_state_dict",
    "longvit_from_torchscale",
    "read_checkpoint",
    "slide_encoder_from_gigapath",
]

_MODULES = {
    "Checkpoint": "files",
    "decoder_from_torchscale": "decoder",
    "encoder_from_slidechat": "slidechat",
    "gigapath_state_dict": "slide",
    "longvit_from_torchscale": "longvit",
    "read_checkpoint": "files",
    "slide_encoder_from_gigapath": "slide",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(_import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
