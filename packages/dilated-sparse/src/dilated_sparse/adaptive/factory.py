"""Build content-adaptive attention: by a function, and by `block_sparse_adaptive` in core."""

from __future__ import annotations

from typing import Any

from dilated_core import AttentionVariant

from dilated_sparse.adaptive.attention import AdaptiveSparseAttention
from dilated_sparse.adaptive.config import AdaptiveSparseConfig
from dilated_sparse.adaptive.multihead import AdaptiveSparseMultiheadAttention
from dilated_sparse.modules.factory import without_branches


def create_adaptive_sparse_attention(
    embed_dim: int = 768, num_heads: int = 12, **options: Any
) -> AdaptiveSparseMultiheadAttention:
    """Build multi-head attention that selects its blocks by their content.

    Args:
        embed_dim, num_heads: See `dilated_core.MultiheadConfig`.
        **options: Other options of `MultiheadConfig` and `AdaptiveSparseConfig`; a budget is
            `sparsity_ratio=`, the fraction of blocks to *keep*, `topk=` or `mass=`.

    Raises:
        TypeError, ValueError: As for `AdaptiveSparseMultiheadAttention`.

    Example:
        >>> create_adaptive_sparse_attention(64, 4, topk=8).attention.config.topk
        8
    """
    return AdaptiveSparseMultiheadAttention(embed_dim=embed_dim, num_heads=num_heads, **options)


def _attention(**options: Any) -> AdaptiveSparseAttention:
    return AdaptiveSparseAttention(**_own(options))


def _multihead(**options: Any) -> AdaptiveSparseMultiheadAttention:
    return AdaptiveSparseMultiheadAttention(**_own(options))


def _own(options: dict[str, Any]) -> dict[str, Any]:
    budget = "a budget of blocks"
    return without_branches(options, "block_sparse_adaptive", AdaptiveSparseConfig, budget)


VARIANT = AttentionVariant(_attention, _multihead)
"""What the entry point `block_sparse_adaptive` of the group `dilated.attention` names."""
