"""Decode token by token: select for the newest query, and attend to the kept blocks of a cache.

Shapes: B batch, T positions of a call, H heads, K heads of k and v, G = H/K, L positions of a
block, A sub-blocks, D head_dim.

The rule is that of the whole sequence. Without `lookahead`, the selection of a block is made at its
first token, from the queries of the block before and this token's own, and stays for the block:
every step equals the row of a causal call. With `lookahead` a token selects by the queries of its
block so far, so the last token of a block selects what the whole block selects in training.
"""

from __future__ import annotations

import torch
from dilated_core.merge import accumulation_dtype

from dilated_sparse.adaptive.choice import Rows, kept_blocks
from dilated_sparse.adaptive.config import AdaptiveSparseConfig
from dilated_sparse.adaptive.gate import BlockGate
from dilated_sparse.adaptive.scores import (
    KeyTerms,
    QueryTerms,
    Shape,
    block_scores,
    key_terms,
    query_terms,
)

Unrotated = tuple[torch.Tensor, torch.Tensor]


class AdaptiveCache:
    """Keys, values and sums of the tokens so far, for `AdaptiveSparseAttention.decode`.

    All sequences of the batch have the same number of tokens. It begins empty and grows; one cache
    for each layer and each batch.

    Example:
        >>> from dilated_sparse import AdaptiveSparseAttention
        >>> attention = AdaptiveSparseAttention(num_heads=2, head_dim=8, topk=4).eval()
        >>> cache = AdaptiveCache()
        >>> q = k = v = torch.randn(1, 100, 2, 8)
        >>> prompt = attention.decode(q, k, v, cache)
        >>> attention.decode(q[:, :1], k[:, :1], v[:, :1], cache).shape, cache.length
        (torch.Size([1, 1, 2, 8]), 101)
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        self._terms: KeyTerms | None = None
        self._recent: list[torch.Tensor] = []
        self._kept: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, with the room for more, and of the sums."""
        tensors = [self._keys, self._values, self._kept, *self._recent]
        if self._terms is not None:
            tensors += [self._terms.mean, self._terms.log_share, *(self._terms.gate or ())]
        return sum(x.nbytes for x in tensors if x is not None)

    def extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        unrotated: Unrotated,
        shape: Shape,
        gate: BlockGate,
    ) -> None:
        """Take in the tokens of a call.

        Raises:
            ValueError: If the cache holds sequences of another number, shape, dtype or device.
        """
        if self._keys is None or self._values is None:
            self._keys, self._values = k[:, :0], v[:, :0]
            self._recent = [x[:, :0] for x in (q, unrotated[0], k, unrotated[1])]
        held = self._keys
        if (held.shape[0], *held.shape[2:]) != (k.shape[0], *k.shape[2:]) or (
            (held.dtype, held.device) != (k.dtype, k.device)
        ):
            raise ValueError(
                f"k has shape {tuple(k.shape)}, {k.dtype} on {k.device}, and the cache holds "
                f"{tuple(held.shape)}, {held.dtype} on {held.device}; decode with a new cache."
            )
        first, self.length = self.length, self.length + k.shape[1]
        self._keys = _appended(self._keys, k, first)
        self._values = _appended(self._values, v, first)
        L = shape.block_size
        # The queries of the last whole block and of the block that is being filled, and the keys
        # that no term holds yet.
        new = (q, unrotated[0], k, unrotated[1])
        recent = [torch.cat(pair, 1) for pair in zip(self._recent, new, strict=True)]
        whole = recent[2].shape[1] // L * L
        if whole:
            added = key_terms(recent[2][:, :whole], recent[3][:, :whole], shape, None, gate)
            self._terms = added if self._terms is None else self._terms.join(added)
        kept_queries = min(recent[0].shape[1], (self.length - 1) % L + 1 + L)
        queries = [x[:, x.shape[1] - kept_queries :] for x in recent[:2]]
        self._recent = [*queries, *(x[:, whole:] for x in recent[2:])]

    def resume(
        self, config: AdaptiveSparseConfig, shape: Shape, gate: BlockGate, scale: float
    ) -> None:
        """Select for the block that the last token of a prompt is in."""
        block, within = divmod(self.length - 1, shape.block_size)
        self._kept = self._select(block, within, config, shape, gate, scale)

    def step(
        self,
        q: torch.Tensor,
        config: AdaptiveSparseConfig,
        shape: Shape,
        gate: BlockGate,
        scale: float,
    ) -> torch.Tensor:
        """Out `(B, 1, H, D)` of the newest token, whose q is `(B, 1, H, D)`."""
        block, within = divmod(self.length - 1, shape.block_size)
        if self._kept is None or within == 0 or config.lookahead:
            self._kept = self._select(block, within, config, shape, gate, scale)
        return self._attend(q, self._kept, block, shape.block_size, scale)

    def _select(
        self,
        block: int,
        within: int,
        config: AdaptiveSparseConfig,
        shape: Shape,
        gate: BlockGate,
        scale: float,
    ) -> torch.Tensor:
        """The kept blocks before the newest token's own, `(B, K, blocks)` bool."""
        q, unrotated = self._recent[:2]
        L, B, K = shape.block_size, q.shape[0], shape.num_kv_heads
        if block == 0 or self._terms is None:
            return torch.zeros(B, K, 0, dtype=torch.bool, device=q.device)
        own = q.shape[1] - within - 1  # where the own block begins
        if config.lookahead:
            rows, wanted = slice(own, None), 0
        else:
            rows, wanted = slice(own - L, own + 1), 1
        # The queries of the block before and the first of the own one are two rows of blocks.
        terms: QueryTerms = query_terms(
            *(q[:, rows], unrotated[:, rows], shape, None, gate), reads_own_block=config.lookahead
        ).rows(wanted, wanted + 1)
        keys = self._terms.leading(block)
        scores = block_scores(terms, keys, scale, first_row=block, is_causal=True)
        scores = torch.nn.functional.pad(scores, (0, 1))
        kept = kept_blocks(scores, config.budget, Rows(block, block + 1, True, None))
        return kept[:, :, 0, :block]

    def _attend(
        self, q: torch.Tensor, kept: torch.Tensor, block: int, L: int, scale: float
    ) -> torch.Tensor:
        assert self._keys is not None
        assert self._values is not None
        B, _, H, D = q.shape
        K = self._keys.shape[2]
        counts = kept.sum(-1)
        most = int(counts.max()) if kept.numel() else 0
        # Kept blocks first, in their order.
        order = torch.sort(kept.to(torch.int8), dim=-1, descending=True, stable=True).indices[
            ..., :most
        ]
        first = torch.cat([order * L, order.new_full((B, K, 1), block * L)], -1)
        positions = first.unsqueeze(-1) + torch.arange(L, device=q.device)
        is_kept = torch.arange(most, device=q.device) < counts.unsqueeze(-1)
        is_kept = torch.nn.functional.pad(is_kept, (0, 1), value=True)
        seen = (is_kept.unsqueeze(-1) & (positions < self.length)).flatten(2)
        at = positions.clamp_max(self.length - 1).flatten(2)  # (B, K, keys)
        b = torch.arange(B, device=q.device)[:, None, None]
        head = torch.arange(K, device=q.device)[:, None]
        wide = accumulation_dtype(q.dtype)
        keys, values = (x[b, at, head].to(wide) for x in (self._keys, self._values))
        rows = q.view(B, K, H // K, D).to(wide) * scale
        scores = (rows @ keys.transpose(-1, -2)).masked_fill(~seen.unsqueeze(2), -torch.inf)
        return (scores.softmax(-1) @ values).view(B, 1, H, D).to(q.dtype)


def _appended(held: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """`held` with `new` from position `length` on; its room doubles when it is full."""
    stop = length + new.shape[1]
    if stop > held.shape[1]:
        room = held.new_zeros(held.shape[0], max(stop, 2 * held.shape[1]), *held.shape[2:])
        room[:, :length] = held[:, :length]
        held = room
    held[:, length:stop] = new
    return held
