"""Blocks that `torch.compile` has compiled, for training and validation alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from dilated_models.layers.blocks import SelfAttentionBlock


def compile_blocks(model: nn.Module, compiler: str) -> None:
    """Compile each block, with one graph for all blocks and all lengths.

    A block's `forward` is compiled and not its call: FSDP2 puts hooks around the call, which gather
    and free weights and would break the graph of each block at other places.

    Args:
        model: The model, before DDP or FSDP wraps it.
        compiler: A backend of `torch.compile`, such as `"inductor"`.
    """
    for block in model.modules():
        if isinstance(block, SelfAttentionBlock):
            block.forward = torch.compile(block.forward, dynamic=True, backend=compiler)


def not_compiling(model: nn.Module) -> AbstractContextManager[Any]:
    """In the block, compiled parts of the model run as they were written.

    A report calls the model with shapes and caches that training never has. Each kind of call would
    be compiled for itself, for seconds or minutes.
    """
    if not any("forward" in vars(block) for block in model.modules()):
        return nullcontext()  # without the five seconds in which PyTorch loads its compiler
    return cast("Any", torch.compiler.set_stance)("force_eager")
