"""MoBA, mixture of block attention (arXiv 2502.13189), as a function."""

from __future__ import annotations

import torch
from dilated_core import AttentionOutput
from dilated_core.checks import check_integer
from dilated_core.inputs import check_backend_name, check_scale

from dilated_sparse.arguments import checked_tensors
from dilated_sparse.presets.ops import attend_chosen, choose_moba


def moba_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_size: int = 512,
    topk: int = 3,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention in which each query and head chooses blocks of keys: MoBA.

    A query sees its own block up to itself, and the `topk − 1` earlier blocks with the highest
    q · mean(k); of equal ones the earlier block. One softmax over all these keys. Exact, forward
    and backward. The choice has no gradient, as in the paper.

    Source: Lu et al., "MoBA: Mixture of Block Attention for Long-Context LLMs", arXiv 2502.13189,
    section 2.2. As in the authors' code, `topk` counts the own block.

    Args:
        q: `(B, S, H, D)`: batch, sequence, heads, head_dim. Any S, any strides. With `cu_seqlens`
            `(T, H, D)`; k, v likewise.
        k, v: `(B, S, H_kv, D)`; H_kv divides H, and H/H_kv consecutive heads of q share one of k
            and v. Each head of q chooses for itself.
        block_size: Positions of a block.
        topk: Blocks that a query sees, its own among them. With ⌈S / block_size⌉ or more this is
            dense causal attention.
        scale: Factor of the scores of attention, not of the choice; 1/√D if None.
        dropout_p: Probability of dropping each attention probability; the others are divided by
            1 − `dropout_p`. Reproducible under `torch.manual_seed`.
        key_padding_mask: `(B, S)` bool, True for padding before and behind each sequence. Blocks
            are counted from the first visible key of a row. Results in padding are 0.
        cu_seqlens: `(M + 1,)` int32 or int64, where each of M documents that are packed one after
            another begins, and where the last one ends. Each has blocks of its own.
        backend: `"auto"` or a name of `dilated_core.available_backends()`.

    Returns:
        `(B, S, H, D)` in the dtype of q.

    Raises:
        TypeError: If an argument has the wrong type, or dtypes differ or are not floating.
        ValueError: If shapes, heads or devices do not fit, a number is out of range,
            `key_padding_mask` hides keys between visible ones, or the backend cannot run.

    Example:
        >>> q, k, v = torch.randn(3, 1, 1000, 4, 16).unbind()
        >>> moba_attention(q, k, v, block_size=64, topk=4).shape
        torch.Size([1, 1000, 4, 16])
    """
    return moba_attention_with_lse(
        q,
        k,
        v,
        block_size,
        topk,
        scale,
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    ).out


def moba_attention_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_size: int = 512,
    topk: int = 3,
    scale: float | None = None,
    *,
    dropout_p: float = 0.0,
    key_padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """`moba_attention` that also returns the log of the softmax denominators.

    Gradients flow through out and lse.

    Args, errors: As for `moba_attention`.

    Returns:
        `out` `(B, S, H, D)` in the dtype of q, and `lse` `(B, S, H)`, natural logarithm, float32
        (float64 for float64 inputs).
    """
    q, k, v = checked_tensors(q, k, v, True, key_padding_mask, cu_seqlens)
    size = check_integer("block_size", block_size, at_least=1)
    topk = check_integer("topk", topk, at_least=1)
    check_backend_name(backend)
    if cu_seqlens is not None:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    out, lse = attend_chosen(
        *(q, k, v, choose_moba(q, k, size, topk - 1, key_padding_mask, cu_seqlens), size),
        scale=check_scale(scale, q.shape[-1]),
        dropout_p=dropout_p,
        key_padding_mask=key_padding_mask,
        cu_seqlens=cu_seqlens,
        backend=backend,
    )
    return AttentionOutput(out, lse) if cu_seqlens is None else AttentionOutput(out[0], lse[0])
