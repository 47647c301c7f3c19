"""The attention that LongNet is compared with.

Fixed-sparse attention, long inputs cut in blocks, and LongNet with detached mixing weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from dilated_core import DilatedPattern, dilated_attention_with_lse
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

BLOCK = 64


class MaskedAttention(nn.Module):
    """Attention that computes only the blocks of queries and the keys that a mask has.

    Args:
        mask: From S to the `(S, S)` mask, True where a query sees a key; each query sees one key at
            least.
    """

    def __init__(self, mask: Callable[[int], Tensor]) -> None:
        super().__init__()
        self._tables = lru_cache(maxsize=4)(lambda seq_len: key_table(mask(seq_len)))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = True,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`(B, S, H, D)` q, k, v -> the same shape. The mask decides about causality."""
        if cu_seqlens is not None:
            return self(*windows(cu_seqlens, q, k, v)).flatten(0, 1)
        B, S, H, D = q.shape
        keys, allowed = (table.to(q.device) for table in self._tables(S))
        rows = allowed.shape[1]
        q = q.view(B, S // rows, rows, H, D).transpose(2, 3)
        # (B, blocks, H, keys, D); a gather, because blocks share keys.
        k, v = (x[:, keys].transpose(2, 3) for x in (k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None])
        return out.transpose(2, 3).reshape(B, S, H, D)


def windows(cu_seqlens: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Packed `(T, H, D)` -> `(B, S, H, D)`, of documents that all have S positions."""
    (length,) = cu_seqlens.diff().unique().tolist()
    return [x.unflatten(0, (-1, length)) for x in tensors]


def key_table(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The keys of each block of queries.

    Returns:
        keys: `(blocks, N)`, ascending; N is the most keys of a block, and shorter rows repeat 0.
        allowed: `(blocks, rows, N)`, whether a query of the block sees the key.
    """
    seq_len = len(mask)
    rows = BLOCK if seq_len % BLOCK == 0 else seq_len
    blocks = mask.view(seq_len // rows, rows, seq_len)
    seen = blocks.any(1)
    width = int(seen.sum(1).max())
    # A stable sort puts the keys that are seen first, in their order.
    keys = seen.to(torch.int8).sort(dim=1, descending=True, stable=True).indices[:, :width]
    allowed = blocks.gather(2, keys[:, None].expand(-1, rows, -1))
    return keys.masked_fill(~seen.gather(1, keys), 0), allowed


def causal(seq_len: int) -> Tensor:
    """A query sees itself and what is before it."""
    return torch.ones(seq_len, seq_len, dtype=torch.bool).tril()


def blockwise_causal(seq_len: int, window: int) -> Tensor:
    """The queries of each block of `window / 2` see their block and the one before it.

    For inputs longer than those of training: no distance is larger than there (XPos, section 3.2).
    """
    if seq_len <= window:
        return causal(seq_len)
    block = torch.arange(seq_len) // (window // 2)
    return causal(seq_len) & (block[:, None] - block <= 1)


def fixed_sparse(seq_len: int, block: int, columns: int) -> Tensor:
    """Fixed attention of Sparse Transformers: the own block, and the last columns of each before.

    Args:
        seq_len: S.
        block: Positions of a block.
        columns: How many positions at the end of each block all later queries see.
    """
    position = torch.arange(seq_len)
    own = position[:, None] // block == position // block
    summary = position % block >= block - columns
    return causal(seq_len) & (own | summary)


def columns_for(keys: float, seq_len: int, block: int) -> int:
    """How many columns give `fixed_sparse` the mean number of keys nearest to `keys`."""
    local = (block + 1) / 2
    later_blocks = (seq_len / block - 1) / 2  # mean number of blocks before that of a query
    return min(block, max(1, round((keys - local) / later_blocks)))


def mean_keys(pattern: DilatedPattern, seq_len: int, num_heads: int) -> float:
    """Mean number of keys of a query with causality; a key of two branches counts twice."""
    return float(pattern.materialize(seq_len, num_heads, is_causal=True).double().sum(-1).mean())


class DetachedMixing(nn.Module):
    """Dilated attention whose gradient does not pass through the weights of the branches.

    So the official implementation trains: forward is the same, dq and dk are not.
    """

    def __init__(self, pattern: DilatedPattern) -> None:
        super().__init__()
        self._branches = [DilatedPattern([w], [r]) for w, r in pattern.branches]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        is_causal: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """`(B, S, H, D)` q, k, v -> the same shape."""
        if cu_seqlens is not None:
            return self(*windows(cu_seqlens, q, k, v), is_causal).flatten(0, 1)
        parts = [
            dilated_attention_with_lse(q, k, v, branch, is_causal=is_causal)
            for branch in self._branches
        ]
        weights = torch.stack([part.lse for part in parts]).softmax(0).detach()
        return sum(
            (w[..., None].to(q.dtype) * part.out for w, part in zip(weights, parts, strict=True)),
            start=torch.zeros_like(q),
        )
