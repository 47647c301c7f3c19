"""Weights and options of `nn.MultiheadAttention`, as `MultiheadDilatedAttention` has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn

from dilated_core.checks import check_tensor
from dilated_core.modules.config import MultiheadConfig

_PARTS = ("q", "k", "v")


def options_of(attention: object) -> dict[str, Any]:
    """The options that build the counterpart of an `nn.MultiheadAttention`.

    Raises:
        TypeError: If it is of another class.
        ValueError: If it has a part without counterpart.
    """
    if not isinstance(attention, nn.MultiheadAttention):
        raise TypeError(
            f"attention is a {type(attention).__name__}; it must be an nn.MultiheadAttention."
        )
    if not attention.batch_first:
        raise ValueError(
            "batch_first is False; MultiheadDilatedAttention takes (batch, sequence, embed_dim), "
            "so build the attention, or the layer around it, with batch_first=True."
        )
    if attention.add_zero_attn:
        raise ValueError(
            "add_zero_attn is True; MultiheadDilatedAttention has no zero key of this kind, so "
            "build the attention without it."
        )
    weight = attention.out_proj.weight
    return {
        "embed_dim": attention.embed_dim,
        "num_heads": attention.num_heads,
        "dropout": attention.dropout,
        "bias": "in_proj_bias" in attention.state_dict(),
        "layer_norm": False,
        "device": weight.device,
        "dtype": weight.dtype,
    }


def convert_multihead_attention(
    state_dict: Mapping[str, torch.Tensor], config: MultiheadConfig, module: nn.Module
) -> dict[str, torch.Tensor]:
    """The state dict of a `MultiheadDilatedAttention` from that of an `nn.MultiheadAttention`.

    Args:
        state_dict: With `in_proj_weight`, or `q_proj_weight`, `k_proj_weight`, `v_proj_weight`.
        config: Of the module to load.
        module: The module to load, whose parameters must have storage.

    Raises:
        TypeError: If an entry is no tensor.
        ValueError: If a key or shape does not fit, or `config` has a part without counterpart.
    """
    _check_counterparts(config, module)
    E = config.embed_dim
    shapes = {"in_proj_weight": (3 * E, E)}
    if not isinstance(cast(object, state_dict), Mapping):
        raise TypeError(f"state_dict is a {type(state_dict).__name__}; it must be a dict.")
    if "in_proj_weight" not in state_dict:
        shapes = {f"{part}_proj_weight": (E, E) for part in _PARTS}
    shapes["out_proj.weight"] = (E, E)
    if config.bias:
        shapes |= {"in_proj_bias": (3 * E,), "out_proj.bias": (E,)}
    _check_entries(state_dict, shapes, config)
    if "in_proj_weight" in state_dict:
        weights = state_dict["in_proj_weight"].chunk(3)
    else:
        weights = tuple(state_dict[f"{part}_proj_weight"] for part in _PARTS)
    converted = {f"{part}_proj.weight": w for part, w in zip(_PARTS, weights, strict=True)}
    converted["out_proj.weight"] = state_dict["out_proj.weight"]
    if config.bias:
        biases = state_dict["in_proj_bias"].chunk(3)
        converted |= {f"{part}_proj.bias": b for part, b in zip(_PARTS, biases, strict=True)}
        converted["out_proj.bias"] = state_dict["out_proj.bias"]
    return converted


def _check_counterparts(config: MultiheadConfig, module: nn.Module) -> None:
    if config.layer_norm:
        raise ValueError(
            "layer_norm is True; nn.MultiheadAttention has no LayerNorm before its output "
            "projection, so build the module with layer_norm=False."
        )
    if config.num_kv_heads not in (None, config.num_heads):
        raise ValueError(
            f"num_kv_heads is {config.num_kv_heads} and num_heads {config.num_heads}; "
            f"nn.MultiheadAttention has as many heads of k and v as of q, so build the module with "
            f"num_kv_heads=None."
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            "the module is on the meta device and has no memory for weights; call "
            "module.to_empty(device=...) first."
        )


def _check_entries(
    state_dict: Mapping[str, torch.Tensor],
    shapes: dict[str, tuple[int, ...]],
    config: MultiheadConfig,
) -> None:
    """Refuse keys and shapes other than `shapes`, and entries without real numbers."""
    for key in state_dict:
        if key in ("bias_k", "bias_v"):
            raise ValueError(
                f"the state dict has {key}; MultiheadDilatedAttention has no learned key or value, "
                f"so only weights of a module without add_bias_kv can be converted."
            )
        if key.endswith("bias") and not config.bias:
            raise ValueError(
                f"the state dict has {key} and the module bias=False; build it with bias=True."
            )
    unknown, missing = state_dict.keys() - shapes, shapes.keys() - state_dict.keys()
    if missing and all(key.endswith("bias") for key in missing) and not unknown:
        raise ValueError(
            f"the state dict lacks {', '.join(sorted(missing))} and the module has biases; build "
            f"it with bias=False."
        )
    if unknown or missing:
        raise ValueError(
            f"the state dict has the keys {', '.join(sorted(state_dict))}; it must have exactly "
            f"{', '.join(shapes)}, as nn.MultiheadAttention.state_dict() does."
        )
    for key, shape in shapes.items():
        check_tensor(key, state_dict[key])
        if not state_dict[key].is_floating_point():
            raise TypeError(
                f"{key} has dtype {state_dict[key].dtype}; it must be a floating-point dtype."
            )
        if state_dict[key].is_meta:
            raise ValueError(
                f"{key} is on meta and holds no values; load the file with another map_location."
            )
        if tuple(state_dict[key].shape) != shape:
            raise ValueError(
                f"{key} has shape {tuple(state_dict[key].shape)}; it must be {shape} for embed_dim "
                f"{config.embed_dim}, and kdim and vdim equal to it."
            )
