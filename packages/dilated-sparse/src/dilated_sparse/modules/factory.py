"""Build block-sparse attention: by a function, and by the name `block_sparse` in core."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from dilated_core import AttentionVariant, DilatedAttentionConfig

from dilated_sparse.modules.attention import BlockSparseAttention
from dilated_sparse.modules.config import BlockSparseAttentionConfig
from dilated_sparse.modules.multihead import BlockSparseMultiheadAttention
from dilated_sparse.pattern.generators import PatternType


def create_block_sparse_attention(
    embed_dim: int = 768,
    num_heads: int = 12,
    sparsity_ratio: float = 0.1,
    pattern_type: PatternType = "dilated_sparse",
    **options: Any,
) -> BlockSparseMultiheadAttention:
    """Build multi-head block-sparse attention.

    Args:
        embed_dim, num_heads: See `dilated_core.MultiheadConfig`.
        sparsity_ratio: Fraction of blocks to *keep*: 0.1 is 90 % sparse.
        pattern_type: `"local_window"`, `"dilated_sparse"`, `"global_local"` or `"hierarchical"`.
        **options: Other options of `MultiheadConfig` and `BlockSparseAttentionConfig`.

    Raises:
        TypeError, ValueError: As for `BlockSparseMultiheadAttention`.

    Example:
        >>> create_block_sparse_attention(64, 4, sparsity_ratio=0.25).attention
        BlockSparseAttention(pattern_type='dilated_sparse', sparsity_ratio=0.25)
    """
    return BlockSparseMultiheadAttention(
        embed_dim=embed_dim,
        num_heads=num_heads,
        sparsity_ratio=sparsity_ratio,
        pattern_type=pattern_type,
        **options,
    )


def _attention(**options: Any) -> BlockSparseAttention:
    return BlockSparseAttention(**_own(options))


def _multihead(**options: Any) -> BlockSparseMultiheadAttention:
    return BlockSparseMultiheadAttention(**_own(options))


def _own(options: dict[str, Any]) -> dict[str, Any]:
    instead = "pattern_type, sparsity_ratio and block_size"
    return without_branches(options, "block_sparse", BlockSparseAttentionConfig, instead)


VARIANT = AttentionVariant(_attention, _multihead)
"""What the entry point `block_sparse` of the group `dilated.attention` names."""


def without_branches(
    options: dict[str, Any], kind: str, config: type[Any], instead: str
) -> dict[str, Any]:
    """The options without those of dilated branches, which core's factories always pass.

    Args:
        options: By name.
        kind: The name of the attention.
        config: Its class of options.
        instead: What to give instead of branches.

    Raises:
        ValueError: If one has another value than its default: it would have no effect.
    """
    own = {field.name for field in fields(config)}
    for field in fields(DilatedAttentionConfig):
        if field.name in own or field.name not in options:
            continue
        value = options[field.name]
        if (tuple(value) if isinstance(value, list) else value) != field.default:  # pyright: ignore
            raise ValueError(
                f"{field.name} is {value!r}; attention {kind!r} has blocks and no dilated "
                f"branches, so leave it out and give {instead}."
            )
    branches = {field.name for field in fields(DilatedAttentionConfig)} - own
    return {name: value for name, value in options.items() if name not in branches}
