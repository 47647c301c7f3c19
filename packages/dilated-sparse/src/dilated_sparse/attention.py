"""Block-sparse attention as functions: check the inputs, attend, return the merged result."""

from __future__ import annotations

import torch
from dilated_core import AttentionOutput
from dilated_core.checks import check_integer
from dilated_core.inputs import check_backend_name, check_scale

from dilated_sparse.arguments import checked_dropout, checked_tensors
from dilated_sparse.ops import attend
from dilated_sparse.pattern.blocks import BlockPattern, check_pattern
from dilated_sparse.pattern.rule import PatternRule


def block_sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: BlockPattern,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of each query over the keys of the blocks that a pattern keeps.

    One softmax per query over all kept keys, exactly, forward and backward: equal to dense
    attention under the mask of the pattern. Compute and memory are linear in the number of kept
    blocks.

    Under `torch.autocast` q, k and v are cast to its dtype, as PyTorch's own attention does.

    Args:
        q: `(B, S, H, D)`: batch, sequence, heads, head_dim. Any S, any strides; the last block may
            be short. With `cu_seqlens` `(T, H, D)`; k, v likewise.
        k, v: `(B, S, H_kv, D)`; H_kv divides H, and H/H_kv consecutive heads of q share one of k
            and v. One floating dtype and one device with q.
        pattern: The kept blocks, of ⌈S / block_size⌉ blocks. It lists one head, which all share, or
            a number of heads that divides H.
        block_size: Positions of a block.
        is_causal: Query i sees only keys j ≤ i: blocks above the diagonal are skipped, whether the
            pattern keeps them or not.
        scale: Factor of the scores; 1/√D if None.
        dropout_p: Probability of dropping each attention probability; the others are divided by
            1 − `dropout_p`. Reproducible under `torch.manual_seed`.
        key_padding_mask: `(B, S)` bool, True for keys that nobody sees. Blocks are counted from the
            first visible key of each batch row, so padding before a sequence does not shift them;
            the row takes the first rows and columns of the pattern. Queries before that key give 0.
            Later ones are queries all the same, and give 0 if no key is left for them.
        cu_seqlens: `(M + 1,)` int32 or int64, where each of M documents that are packed one after
            another begins, and where the last one ends. Blocks are counted from the first position
            of each document, which takes the first rows and columns of the pattern; the pattern
            is for the longest document or a longer one.
        backend: `"auto"` or a name of `dilated_core.available_backends()`. A named backend is used
            or refused, never replaced.

    Returns:
        `(B, S, H, D)` in the dtype of q.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ or are not floating.
        ValueError: If shapes, heads, devices or the length of the pattern do not fit, a number is
            out of range, a causal row keeps no block, or the backend cannot run the inputs.

    Example:
        >>> from dilated_sparse import dilated_sparse
        >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()  # 16 blocks, the last one short
        >>> pattern = dilated_sparse(16, sparsity_ratio=0.25)
        >>> block_sparse_attention(q, k, v, pattern, block_size=64, is_causal=True).shape
        torch.Size([1, 1000, 4, 16])
    """
    return block_sparse_attention_with_lse(
        q,
        k,
        v,
        pattern,
        block_size,
        is_causal,
        scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    ).out


def block_sparse_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: BlockPattern,
    block_size: int = 64,
    is_causal: bool = False,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """`block_sparse_attention` that also returns the log of the softmax denominators.

    `dilated_core.merge_partials` merges it with results over other keys. Gradients flow through out
    and lse.

    Args, errors: As for `block_sparse_attention`.

    Returns:
        `out` `(B, S, H, D)` in the dtype of q, and `lse` `(B, S, H)`, natural logarithm, float32
        (float64 for float64 inputs).
    """
    return attend_checked(
        q,
        k,
        v,
        pattern,
        block_size,
        is_causal,
        scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )


def attend_checked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: BlockPattern | PatternRule,
    block_size: int,
    is_causal: bool,
    scale: float | None,
    *,
    dropout_p: float,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> AttentionOutput:
    """`block_sparse_attention_with_lse`, also with the rule of a pattern: check and attend."""
    q, k, v = checked_tensors(q, k, v, is_causal, key_padding_mask, cu_seqlens)
    if isinstance(pattern, BlockPattern):
        pattern.check_heads(q.shape[-2])
    elif not isinstance(pattern, PatternRule):
        check_pattern(pattern)
    size = check_integer("block_size", block_size, at_least=1)
    check_backend_name(backend)
    dropout_p, dropout_seed = checked_dropout(dropout_p)
    if cu_seqlens is not None:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse = attend(
        q,
        k,
        v,
        pattern,
        block_size=size,
        is_causal=is_causal,
        scale=check_scale(scale, q.shape[-1]),
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return AttentionOutput(out, lse) if cu_seqlens is None else AttentionOutput(out[0], lse[0])
