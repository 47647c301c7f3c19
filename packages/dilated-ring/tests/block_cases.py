"""Calls over patterns of blocks, and dense attention in float64 under their mask: the oracle."""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from dilated_sparse import (
    BlockPattern,
    dilated_sparse,
    global_local,
    hierarchical,
    local_window,
    random_blocks,
)
from hypothesis import strategies as st

PATTERNS: dict[str, Any] = {
    "window": lambda n: local_window(n, window=1),
    "diagonal": lambda n: local_window(n, window=0),
    "strided": lambda n: dilated_sparse(n, sparsity_ratio=0.4),
    "sinks": lambda n: global_local(n, window=0, num_global=1),
    "coarse": lambda n: hierarchical(n),
    "dense": lambda n: local_window(n, window=n),
    "per head": lambda n: random_blocks(n, num_random=2, seed=3, num_heads=4),
    "per pair": lambda n: BlockPattern.per_head(
        [local_window(n, window=2), global_local(n, window=0, num_global=1)]
    ),
}


@dataclass(frozen=True)
class BlockCase:
    """A call over the whole sequence; lists of 2 and of 4 heads need as many or a multiple."""

    seq_len: int
    block_size: int = 4
    pattern_name: str = "strided"
    num_heads: int = 4
    num_kv_heads: int = 4
    batch_size: int = 1
    is_causal: bool = False
    masked: float | None = None
    documents: tuple[int, ...] = ()
    scale: float | None = None

    @property
    def pattern(self) -> BlockPattern:
        longest = max(self.documents, default=self.seq_len)
        return PATTERNS[self.pattern_name](max(1, -(-longest // self.block_size)))

    def options(self) -> dict[str, Any]:
        mask = cu_seqlens = None
        if self.masked is not None:
            generator = torch.Generator().manual_seed(1)
            shape = (self.batch_size, self.seq_len)
            mask = torch.rand(shape, generator=generator) < self.masked
            # Blocks begin at the first visible key.
            mask[:, 0] = self.masked == 1
        if self.documents:
            bounds = [sum(self.documents[:i]) for i in range(len(self.documents) + 1)]
            cu_seqlens = torch.tensor(bounds)
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "key_padding_mask": mask,
            "cu_seqlens": cu_seqlens,
        }

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
        """q, k, v with gradients, and an upstream gradient that is not contiguous."""
        generator = torch.Generator().manual_seed(0)
        rows = (self.seq_len,) if self.documents else (self.batch_size, self.seq_len)
        H, K = self.num_heads, self.num_kv_heads
        q, k, v, dout = (
            torch.randn(*rows, heads, 8, generator=generator, dtype=torch.float64).to(dtype)
            for heads in (H, K, K, H)
        )
        dout = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
        return [*(x.requires_grad_() for x in (q, k, v)), dout]

    def visible(self) -> torch.Tensor:
        """Which keys each query sees: `(B, H, S, S)` bool."""
        S, size = self.seq_len, self.block_size
        mask = self.pattern.materialize(num_heads=self.num_heads)
        mask = mask.repeat_interleave(size, 1).repeat_interleave(size, 2)
        visible = torch.zeros(self.num_heads, S, S, dtype=torch.bool)
        start = 0
        for length in self.documents or (S,):
            rows = slice(start, start + length)
            visible[:, rows, rows] = mask[:, :length, :length]
            start += length
        visible = visible.tril() if self.is_causal else visible
        visible = visible.expand(self.batch_size, *visible.shape)
        hidden = self.options()["key_padding_mask"]
        return visible if hidden is None else visible & ~hidden[:, None, None]


def dense(case: BlockCase, *qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of dense attention under the mask, differentiable."""
    q, k, v = (x.unsqueeze(0) if case.documents else x for x in qkv)
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if case.scale is None else case.scale
    mask = case.visible()
    scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
    sees = mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -torch.inf).masked_fill(~sees, 0)
    p = scores.softmax(-1).masked_fill(~sees, 0)
    lse = scores.logsumexp(-1).masked_fill(~sees.squeeze(-1), -torch.inf).transpose(1, 2)
    out = torch.einsum("bhst,bthd->bshd", p, v)
    return (out[0], lse[0]) if case.documents else (out, lse)


CASES = (
    BlockCase(1, pattern_name="window"),
    BlockCase(3, block_size=8, pattern_name="diagonal", is_causal=True),
    BlockCase(32, pattern_name="window", is_causal=True, batch_size=2),
    BlockCase(50, block_size=7, pattern_name="strided", num_kv_heads=2, batch_size=2),
    BlockCase(61, block_size=8, pattern_name="sinks", is_causal=True),
    BlockCase(47, pattern_name="coarse", is_causal=True, masked=0.4, batch_size=2),
    BlockCase(40, block_size=16, pattern_name="dense", num_kv_heads=1, is_causal=True),
    BlockCase(45, block_size=5, pattern_name="per head", num_kv_heads=2, is_causal=True),
    BlockCase(45, block_size=1, pattern_name="per pair", num_heads=6, num_kv_heads=3),
    BlockCase(60, pattern_name="per head", num_heads=8, masked=0.9, batch_size=2, scale=0.3),
    BlockCase(60, documents=(20, 1, 7, 0, 32), pattern_name="strided", is_causal=True),
    BlockCase(44, documents=(30, 14), block_size=3, pattern_name="sinks", num_kv_heads=2),
    BlockCase(30, masked=1.0, pattern_name="coarse"),
)


@st.composite
def block_cases(draw: Any, max_seq_len: int = 48) -> BlockCase:
    seq_len = draw(st.integers(1, max_seq_len))
    name = draw(st.sampled_from(sorted(PATTERNS)))
    num_heads, num_kv_heads = draw(st.sampled_from([(4, 4), (4, 2), (4, 1), (12, 4), (12, 6)]))
    case = BlockCase(
        seq_len,
        draw(st.integers(1, 9)),
        name,
        num_heads,
        num_kv_heads,
        is_causal=draw(st.booleans()),
    )
    kind = draw(st.sampled_from(["plain", "batch", "masked", "documents"]))
    if kind == "documents":
        cut = sorted(draw(st.lists(st.integers(0, seq_len), max_size=3)))
        bounds = [0, *cut, seq_len]
        lengths = tuple(b - a for a, b in pairwise(bounds))
        # In shorter documents a row of these patterns may keep only blocks that they do not have.
        return case if name in ("per head", "strided") else replace(case, documents=lengths)
    masked = draw(st.sampled_from([0.2, 0.8])) if kind == "masked" else None
    return replace(case, masked=masked, batch_size=1 if kind == "plain" else 2)
