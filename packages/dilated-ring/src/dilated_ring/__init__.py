"""Dilated attention over a sequence that is spread over ranks, exact on any number of them.

The rooms, in the order to read them: `layout` tells which positions each rank holds. `plan`
computes which rows travel. `transport` carries them. `sharding` cuts sequences and puts them
together. `execution` attends while rows travel, forward and backward. `attention` has the public
functions, `modules` the layers, `training` the loss, and `gradients` a hook for
DistributedDataParallel.
"""

from importlib.metadata import version as _version

from dilated_ring.attention import (
    ring_dilated_attention,
    ring_dilated_attention_with_lse,
    simulated_ring_attention,
)
from dilated_ring.layout import Layout

__version__ = _version("dilated-ring")

__all__ = [
    # attention
    "Layout",
    "ring_dilated_attention",
    "ring_dilated_attention_with_lse",
    "simulated_ring_attention",
]
