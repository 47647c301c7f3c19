"""Torchscale's names of weights of an encoder; `load_state_dict` of an encoder accepts them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

# LayerNorms inside the halves of a layer; all other names are the same.
_PAIRS = (
    (".self_attn.layer_norm.", ".self_attn.inner_attn_ln."),
    (".ffn.layer_norm.", ".ffn.ffn_layernorm."),
)


def published_name(name: str) -> str:
    """Torchscale's name of a weight of an encoder.

    Example:
        >>> published_name("layers.0.ffn.layer_norm.bias")
        'layers.0.ffn.ffn_layernorm.bias'
    """
    for ours, published in _PAIRS:
        name = name.replace(ours, published)
    return name


def with_published_names(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under torchscale's names, whichever names they have.

    Weights that have both names of one stay as they are.
    """
    renamed = {published_name(name): tensor for name, tensor in weights.items()}
    return renamed if len(renamed) == len(weights) else dict(weights)


def accept_published_names(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Rename published weights in a state dict that is being loaded; a hook of `nn.Module`."""
    for name in [name for name in state_dict if name.startswith(prefix)]:
        own = name
        for ours, published in _PAIRS:
            own = own.replace(published, ours)
        if own != name:
            state_dict[own] = state_dict.pop(name)
