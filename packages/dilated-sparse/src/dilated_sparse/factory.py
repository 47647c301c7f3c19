"""Build attention that chooses its blocks by content, by each of the methods there are."""

from __future__ import annotations

from typing import Any, Literal, get_args, overload

from dilated_core.checks import check_choice

from dilated_sparse.adaptive.multihead import AdaptiveSparseMultiheadAttention
from dilated_sparse.presets.moba_modules import MoBAMultiheadAttention
from dilated_sparse.presets.nsa_module import NativeSparseAttention

AdaptiveMethod = Literal["learned", "moba", "nsa"]


@overload
def create_adaptive_sparse_attention(
    embed_dim: int = ..., num_heads: int = ..., method: Literal["learned"] = ..., **options: Any
) -> AdaptiveSparseMultiheadAttention: ...


@overload
def create_adaptive_sparse_attention(
    embed_dim: int = ..., num_heads: int = ..., *, method: Literal["moba"], **options: Any
) -> MoBAMultiheadAttention: ...


@overload
def create_adaptive_sparse_attention(
    embed_dim: int = ..., num_heads: int = ..., *, method: Literal["nsa"], **options: Any
) -> NativeSparseAttention: ...


def create_adaptive_sparse_attention(
    embed_dim: int = 768, num_heads: int = 12, method: AdaptiveMethod = "learned", **options: Any
) -> AdaptiveSparseMultiheadAttention | MoBAMultiheadAttention | NativeSparseAttention:
    """Build multi-head attention that selects its blocks by their content.

    Args:
        embed_dim, num_heads: See `dilated_core.MultiheadConfig`.
        method: `"learned"`, rows of blocks by an estimate of their softmax mass that learns; or a
            published method in which each query chooses earlier blocks, always causal: `"moba"`
            (arXiv 2502.13189) or `"nsa"` (arXiv 2502.11089).
        **options: Other options of `MultiheadConfig`, and of `AdaptiveSparseConfig`, `MoBAConfig`
            or `NSAConfig`. The budget of `"learned"` is `sparsity_ratio=`, the fraction of blocks
            to *keep*, `topk=` or `mass=`; that of `"moba"` is `topk=`, and that of `"nsa"`
            `num_selected_blocks=`.

    Raises:
        TypeError, ValueError: As for `AdaptiveSparseMultiheadAttention`, `MoBAMultiheadAttention`
            or `NativeSparseAttention`; also if the method is unknown.

    Example:
        >>> create_adaptive_sparse_attention(64, 4, topk=8).attention.config.topk
        8
        >>> create_adaptive_sparse_attention(64, 4, method="moba", block_size=64).attention
        MoBAAttention(block_size=64, topk=3)
    """
    check_choice("method", method, get_args(AdaptiveMethod))
    build: Any = {
        "learned": AdaptiveSparseMultiheadAttention,
        "moba": MoBAMultiheadAttention,
        "nsa": NativeSparseAttention,
    }[method]
    return build(embed_dim=embed_dim, num_heads=num_heads, **options)
