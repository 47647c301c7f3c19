"""Build attention modules by name: `auto`, `standard`, `improved`, and what other packages add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, NamedTuple

from torch import nn

from dilated_core.modules.config import DilatedAttentionConfig, MultiheadConfig
from dilated_core.modules.dilated import DilatedAttention
from dilated_core.modules.multihead import MultiheadDilatedAttention

ENTRY_POINT_GROUP = "dilated.attention"

# For names of packages that are not installed, the error tells what to install.
_PROVIDERS = {
    "distributed": "dilated-ring",
    "ring": "dilated-ring",
    "ring_distributed": "dilated-ring",
    "ring_hilbert": "dilated-ring",
    "ring_block_sparse": "dilated-ring",
    "block_sparse": "dilated-sparse",
    "block_sparse_adaptive": "dilated-sparse",
    "moba": "dilated-sparse",
    "nsa": "dilated-sparse",
}


class AttentionVariant(NamedTuple):
    """The two builders behind a factory name. Entry points of `dilated.attention` point to one.

    Attributes:
        attention: Builds the module on q, k, v from the options of `DilatedAttentionConfig`.
        multihead: Builds the module with projections from the options of `DilatedAttentionConfig`
            and `MultiheadConfig`.
    """

    attention: Callable[..., nn.Module]
    multihead: Callable[..., nn.Module]


# Three names of one module, for users of earlier libraries. Speed is a choice of `backend`.
_OWN = dict.fromkeys(
    ("auto", "improved", "standard"), AttentionVariant(DilatedAttention, MultiheadDilatedAttention)
)


def create_dilated_attention(
    kind: str = "auto",
    *,
    attention_config: DilatedAttentionConfig | None = None,
    **options: Any,
) -> nn.Module:
    """Build attention on q, k, v by name.

    Args:
        kind: `"auto"`, `"standard"` or `"improved"`, which build the same module (its option
            `backend` chooses the backend, by default the fastest), or the name of another package.
        attention_config: Options as an object, which is not changed.
        **options: Options of `DilatedAttentionConfig` as keywords. They override the object.

    Raises:
        ValueError: If the name is unknown, or its package is not installed or cannot be loaded.
        TypeError: If an option is unknown, or a config is of another class.

    Example:
        >>> create_dilated_attention("improved", segment_lengths=[64, 128], dilation_rates=[1, 2])
        DilatedAttention(segment_lengths=[64, 128], dilation_rates=[1, 2])
    """
    settings = {
        **_fields("attention_config", attention_config, DilatedAttentionConfig),
        **options,
    }
    return _variant(kind).attention(**settings)


def create_multihead_dilated_attention(
    kind: str = "auto",
    *,
    multihead_config: MultiheadConfig | None = None,
    attention_config: DilatedAttentionConfig | None = None,
    **options: Any,
) -> nn.Module:
    """Build attention with query, key, value and output projections by name.

    Args:
        kind: As for `create_dilated_attention`.
        multihead_config: Options of the projections as an object, which is not changed.
        attention_config: Options of the attention as an object, which is not changed.
        **options: Options of both configs as keywords. They override the objects.

    Raises:
        ValueError, TypeError: As for `create_dilated_attention`.

    Example:
        >>> mha = create_multihead_dilated_attention("auto", embed_dim=64, num_heads=4)
        >>> mha.attention.pattern.segment_lengths
        (2048, 4096, 8192)
    """
    settings = {
        **_fields("multihead_config", multihead_config, MultiheadConfig),
        **_fields("attention_config", attention_config, DilatedAttentionConfig),
        **options,
    }
    return _variant(kind).multihead(**settings)


def _fields(
    name: str,
    config: object,
    expected: type[DilatedAttentionConfig] | type[MultiheadConfig],
) -> dict[str, Any]:
    """The options of a config, or the defaults for None."""
    config = expected() if config is None else config
    if not isinstance(config, expected):
        raise TypeError(
            f"{name} is a {type(config).__name__}; it must be a {expected.__name__}, and single "
            f"options can be given as keywords instead."
        )
    return {field.name: getattr(config, field.name) for field in fields(config)}


def _variant(kind: str) -> AttentionVariant:
    if not isinstance(kind, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"kind is {kind!r}; it must be a name, such as 'auto'.")
    if kind in _OWN:
        return _OWN[kind]
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=kind):
        return _load(entry_point)
    if kind in _PROVIDERS:
        package = _PROVIDERS[kind]
        try:
            release = version(package)
        except PackageNotFoundError:
            raise ValueError(
                f"attention {kind!r} is not installed; it comes with the package {package}."
            ) from None
        raise ValueError(f"attention {kind!r} is not part of the installed {package} {release}.")
    installed = sorted({*_OWN, *entry_points(group=ENTRY_POINT_GROUP).names})
    raise ValueError(
        f"attention {kind!r} is unknown; it must be one of {', '.join(map(repr, installed))}."
    )


def _load(entry_point: EntryPoint) -> AttentionVariant:
    try:
        variant: object = entry_point.load()
    except Exception as error:  # a compiled extension for another PyTorch fails with any error
        raise ValueError(
            f"attention {entry_point.name!r} is installed but cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(variant, AttentionVariant):
        raise ValueError(
            f"attention {entry_point.name!r} is installed but cannot be used: {entry_point.value} "
            f"is a {type(variant).__name__}; it must be a dilated_core.AttentionVariant."
        )
    return variant
