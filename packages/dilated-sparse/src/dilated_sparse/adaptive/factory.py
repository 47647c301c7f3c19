"""Build content-adaptive attention by the name `block_sparse_adaptive` in core."""

from __future__ import annotations

from typing import Any

from dilated_core import AttentionVariant

from dilated_sparse.adaptive.attention import AdaptiveSparseAttention
from dilated_sparse.adaptive.config import AdaptiveSparseConfig
from dilated_sparse.adaptive.multihead import AdaptiveSparseMultiheadAttention
from dilated_sparse.modules.factory import without_branches


def _attention(**options: Any) -> AdaptiveSparseAttention:
    return AdaptiveSparseAttention(**_own(options))


def _multihead(**options: Any) -> AdaptiveSparseMultiheadAttention:
    return AdaptiveSparseMultiheadAttention(**_own(options))


def _own(options: dict[str, Any]) -> dict[str, Any]:
    budget = "a budget of blocks"
    return without_branches(options, "block_sparse_adaptive", AdaptiveSparseConfig, budget)


VARIANT = AttentionVariant(_attention, _multihead)
"""What the entry point `block_sparse_adaptive` of the group `dilated.attention` names."""
