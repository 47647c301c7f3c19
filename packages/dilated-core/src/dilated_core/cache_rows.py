"""Where a decoding cache keeps what, as tensors on its device; and decoding with plain PyTorch.

B batch, H heads, H_kv heads of k and v, D head_dim, w segment length, r dilation rate.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from dilated_core.decoding_plan import Block
from dilated_core.merge import fold_lse_
from dilated_core.output import AttentionOutput
from dilated_core.pattern import Branch, DilatedPattern, kept_rows


class IndexedBlock:
    """A block of the plan with its heads as index tensors on the device of the cache.

    `shape` is (heads of k and v, heads of q that read each of them).
    """

    def __init__(self, block: Block, device: torch.device) -> None:
        self.offset = block.offset
        self.kv_heads = torch.tensor(block.kv_heads, device=device)
        # Those of one head of k and v are neighbours.
        self.q_heads = torch.tensor(block.q_heads, device=device).flatten()
        self._first_row = block.first_row
        self._num_rows = block.num_rows
        self.shape = (len(block.kv_heads), len(block.q_heads[0]))

    def view(self, cached: torch.Tensor) -> torch.Tensor:
        """Its part of the keys or values: `(B, heads of k and v, rows, D)`."""
        B, _, D = cached.shape
        G, M = self.shape[0], self._num_rows
        return cached[:, self._first_row : self._first_row + G * M].view(B, G, M, D)


class CacheLayout(NamedTuple):
    """Which rows of a cache belong to which heads, made once so that a step copies nothing.

    A token at position t has the index i = t mod w in its segment. A branch keeps it for the heads
    whose offset is i mod r, in row i // r of their block; they see the rows up to that one. Heads
    with another offset see nothing of the branch. Heads of q that share a head of k and v and an
    offset have one block.

    Attributes:
        branches: w and r of each branch, no larger than make a difference.
        blocks: For each branch, its blocks with their heads.
        branch_table: int64 `(branches, 2)`: `branches` on the device of the cache.
        offsets: int64 `(branches, H)`: of each head of q in a segment.
        first_rows: int64 `(branches, H)`: the first row of the block that each head of q reads.
    """

    branches: tuple[Branch, ...]
    blocks: list[list[IndexedBlock]]
    branch_table: torch.Tensor
    offsets: torch.Tensor
    first_rows: torch.Tensor


def index_blocks(
    pattern: DilatedPattern,
    blocks: list[list[Block]],
    num_heads: int,
    max_seq_len: int | None,
    device: torch.device,
) -> CacheLayout:
    """The plan of `plan_blocks` on a device."""
    # No position is as far as 2^62. A rate beyond w keeps what w as the rate keeps.
    longest = 2**62 if max_seq_len is None else max_seq_len
    lengths = [min(w, longest) for w in pattern.segment_lengths]
    branches = tuple(
        Branch(w, min(r, w)) for w, r in zip(lengths, pattern.dilation_rates, strict=True)
    )
    shape = (len(blocks), num_heads)
    offsets, first_rows = torch.zeros(2, *shape, dtype=torch.int64).unbind()
    for index, branch in enumerate(blocks):
        for block in branch:
            for i, q_heads in enumerate(block.q_heads):
                offsets[index, q_heads] = block.offset
                first_rows[index, q_heads] = block.first_row + i * block.num_rows
    return CacheLayout(
        branches,
        [[IndexedBlock(block, device) for block in branch] for branch in blocks],
        torch.tensor(branches, device=device),
        offsets.to(device),
        first_rows.to(device),
    )


def append_tokens(
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: CacheLayout,
    position: int,
) -> None:
    """Store what the segments of the last of the tokens keep of them.

    Args:
        k, v: `(B, n, H_kv, D)`, n at least 1.
        keys, values: `(B, rows, D)`, the cache.
        layout: Of the cache.
        position: Of the first of the tokens.
    """
    start, stop = position, position + k.shape[1]
    for (w, r), branch in zip(layout.branches, layout.blocks, strict=True):
        segment = (stop - 1) // w * w
        oldest = max(start, segment)
        for block in branch:
            row = kept_rows(oldest - segment, r, block.offset)  # the first one not yet stored
            first = segment + block.offset + row * r
            if first >= stop:
                continue
            last_row = row + kept_rows(stop - first, r, 0)
            for cached, new in ((keys, k), (values, v)):
                kept = new[:, first - start : stop - start : r].index_select(2, block.kv_heads)
                block.view(cached)[:, :, row:last_row] = kept.transpose(1, 2)


def attend_newest(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: CacheLayout,
    *,
    position: int,
    scale: float,
) -> AttentionOutput:
    """Attention of the token at `position`, which is in the cache already.

    Args:
        q: `(B, 1, H, D)`.
        keys, values: `(B, rows, D)`, the cache.
        layout: Of the cache.
        position: Of the token.
        scale: Factor of the scores.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BHD = q[:, 0].to(dtype) * scale
    out = torch.zeros_like(q_BHD)
    lse = q_BHD.new_full(q_BHD.shape[:2], -torch.inf)
    for (w, r), branch in zip(layout.branches, layout.blocks, strict=True):
        row, offset = divmod(position % w, r)
        for block in branch:
            if block.offset != offset:
                continue
            # (B, heads of k and v, rows, D), and heads of q in the place of rows.
            block_keys, block_values = (
                block.view(cached)[:, :, : row + 1].to(dtype) for cached in (keys, values)
            )
            queries = q_BHD.index_select(1, block.q_heads)
            scores = queries.view(len(q), *block.shape, q.shape[3]) @ block_keys.mT
            new_lse = scores.logsumexp(-1, keepdim=True)
            new_out = ((scores - new_lse).exp() @ block_values).flatten(1, 2)
            # A head may see other branches: fold this one into what they gave.
            block_lse = lse.index_select(1, block.q_heads)
            weight = fold_lse_(block_lse, new_lse.flatten(1))
            block_out = out.index_select(1, block.q_heads)
            lse.index_copy_(1, block.q_heads, block_lse)
            out.index_copy_(1, block.q_heads, block_out.lerp(new_out, weight[..., None]))
    return AttentionOutput(out.to(q.dtype)[:, None], lse[:, None])
