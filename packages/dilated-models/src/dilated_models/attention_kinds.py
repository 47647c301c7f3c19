"""The kinds of attention that a LongNet may have: their options, checked, and their modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from dilated_core import create_dilated_attention, create_multihead_dilated_attention
from dilated_core.checks import check_choice, check_number
from torch import nn

AttentionKind = Literal["dilated", "ring", "block_sparse", "block_sparse_adaptive", "moba", "nsa"]

WITH_BRANCHES = ("dilated", "ring")
"""The kinds with dilated branches; the fields of branches have no effect on the others."""

OVER_RANKS = ("dilated", "ring", "block_sparse")
"""The kinds that run on the shards of a sequence."""

# Fields of a config that describe dilated branches.
_BRANCH_FIELDS = ("segment_lengths", "dilation_rates", "head_offsets", "padding", "local_window")

_RING_OPTIONS = ("layout", "exchange", "timeout_s")

# Options of modules of dilated-sparse that follow from other fields of a config.
_FIELDS_OF_CONFIG = (
    *("scale", "dropout", "backend"),
    *_BRANCH_FIELDS,
    *("embed_dim", "num_heads", "num_kv_heads", "head_dim", "device", "dtype"),
    *("bias", "layer_norm", "layer_norm_eps", "gamma_init"),
)


def checked_options(
    kind: str, options: Mapping[str, Any] | Sequence[tuple[str, Any]]
) -> tuple[tuple[str, Any], ...]:
    """The options of a kind as sorted pairs; `built_attention` checks the values of blocks.

    Raises:
        ImportError: If the kind needs a package that is not installed.
        TypeError: If they are no dict, or an option of `"ring"` is unknown.
        ValueError: If the kind is unknown, or an option has no effect or is out of range.
    """
    check_choice("attention_kind", kind, get_args(AttentionKind))
    try:
        given = dict(options)
    except (TypeError, ValueError):
        raise TypeError(
            f"attention_options is {options!r}; it must be a dict, such as {{'block_size': 64}}."
        ) from None
    if kind == "dilated" and given:
        raise ValueError(
            f"attention_options is {given!r} and attention_kind 'dilated', whose options are "
            f"fields of this config, so leave attention_options out."
        )
    if kind == "ring":
        for name in given:
            if name not in _RING_OPTIONS:
                raise TypeError(
                    f"attention_options holds {name!r}; for attention_kind 'ring' it may hold "
                    f"{', '.join(_RING_OPTIONS)}. The branches are fields of this config."
                )
        check_spreading(**given)
    elif kind != "dilated":
        for name in _FIELDS_OF_CONFIG:
            if name in given:
                raise ValueError(
                    f"attention_options holds {name}; it must hold options of the blocks only, so "
                    f"leave it out. The scale is 1/√head_dim, attention probabilities are never "
                    f"dropped, and the backend and the sizes are fields of the config."
                )
        if given.get("lookahead"):
            raise ValueError(
                "attention_options holds lookahead=True; it must be False, because a token would "
                "select its blocks by later tokens, which it must predict."
            )
    return tuple(sorted(given.items()))


def options_with_defaults(kind: str, options: Mapping[str, Any]) -> Any:
    """The config of dilated-sparse for a kind without branches."""
    import dilated_sparse

    configs = {
        "block_sparse": dilated_sparse.BlockSparseAttentionConfig,
        "block_sparse_adaptive": dilated_sparse.AdaptiveSparseConfig,
        "moba": dilated_sparse.MoBAConfig,
        "nsa": dilated_sparse.NSAConfig,
    }
    return configs[kind](**options)


def check_no_branches(config: Any, kind: str) -> None:
    """Refuse fields of a config that have no effect on a kind without branches.

    Raises:
        ValueError: If one has another value than its default.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        value = tuple(value) if isinstance(value, list) else value  # pyright: ignore
        if field.name in _BRANCH_FIELDS and value != field.default:
            raise ValueError(
                f"{field.name} is {value!r}; attention_kind {kind!r} has no dilated branches, so "
                f"leave it out."
            )


def check_spreading(
    layout: str = "contiguous", exchange: str = "auto", timeout_s: float | None = None
) -> None:
    """Refuse what `dilated_ring.ring_dilated_attention` does not take as these arguments.

    Raises:
        ImportError: If dilated-ring is not installed.
        TypeError: If `timeout_s` is no number.
        ValueError: If a value is out of range.
    """
    try:
        from dilated_ring.arguments import EXCHANGES
        from dilated_ring.layout import LAYOUTS
    except ModuleNotFoundError as error:
        raise ImportError(
            f"attention over ranks needs dilated-ring, and {error.name} is not installed: "
            f"pip install 'dilated-models[ring]'"
        ) from error
    check_choice("layout", layout, LAYOUTS)
    check_choice("exchange", exchange, EXCHANGES)
    if timeout_s is not None:
        check_number("timeout_s", timeout_s, above=0)


def built_attention(
    kind: str,
    options: Mapping[str, Any],
    *,
    backend: str,
    layer_norm_eps: float,
    num_heads: int,
    head_dim: int,
    num_kv_heads: int | None = None,
    gamma_init: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """The attention of a kind without branches: on q, k and v, or for `"nsa"` a whole layer.

    Raises:
        TypeError, ValueError: As for the options of this kind; if it is not installed.
    """
    sizes: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    placed: dict[str, Any] = {"device": device, "dtype": dtype}
    if kind == "nsa":
        return create_multihead_dilated_attention(
            kind,
            embed_dim=num_heads * head_dim,
            layer_norm_eps=layer_norm_eps,
            gamma_init=gamma_init,
            backend=backend,
            **sizes,
            **placed,
            **options,
        )
    if kind == "block_sparse_adaptive":
        options = {**options, **sizes, "head_dim": head_dim, **placed}
    return create_dilated_attention(kind, backend=backend, **options)
