"""Attention with a bias for each kept block: log g is added to the lse of a block before the merge.

That is one softmax over the scores plus the bias of their block, exactly, and the gradient of the
output reaches the bias. Each block of a row is a partial result of its own, so memory grows with
the number of blocks that a row keeps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from dilated_core import AttentionOutput, merge_partials

from dilated_sparse.pattern.selection import BlockSelection

Attend = Callable[[BlockSelection, bool], AttentionOutput]
"""Attention over a selection, causal or not, of fixed q, k and v."""


def biased_attention(
    attend: Attend,
    selection: BlockSelection,
    log_gains: torch.Tensor,
    seq_len: int,
    block_size: int,
    group: int,
    *,
    is_causal: bool,
) -> AttentionOutput:
    """One softmax over the kept keys, of scores plus the log gain of their block.

    Args:
        attend: Attends over other selections of the same tensors.
        selection: The kept blocks.
        log_gains: `(B, K, N, M)`, of each entry of `selection.block_indices`. In causal attention
            that of the row's own block is not read: it is 0.
        seq_len, block_size: Positions of the sequence and of a block.
        group: Heads of q that share a head of k.
        is_causal: Whether query i sees only keys j ≤ i.
    """
    counts, indices = selection
    N, one = counts.shape[2], torch.ones_like(counts)
    own = torch.arange(N, dtype=indices.dtype, device=indices.device)
    partials: list[AttentionOutput] = []
    if is_causal:
        diagonal = BlockSelection(one, own.expand(counts.shape).unsqueeze(-1).contiguous())
        out, lse = attend(diagonal, True)
        # Adds 0, so that the gate has a gradient where a sequence is one block.
        partials.append(AttentionOutput(out, lse + log_gains[..., :0].sum().to(lse.dtype)))
    others = counts - int(is_causal)
    for m in range(indices.shape[-1]):
        has_block = m < others
        if not bool(has_block.any()):
            break
        blocks = indices[..., m].where(has_block, 0).unsqueeze(-1).contiguous()
        out, lse = attend(BlockSelection(one, blocks), False)
        gain = log_gains[..., m].masked_fill(~has_block, -torch.inf)
        # (B, K, N) -> (B, S, H)
        gain = gain.transpose(1, 2).repeat_interleave(block_size, 1)[:, :seq_len]
        partials.append(AttentionOutput(out, lse + gain.repeat_interleave(group, 2).to(lse.dtype)))
    return merge_partials(partials)
