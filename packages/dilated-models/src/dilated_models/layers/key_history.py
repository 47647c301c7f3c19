"""All keys and values of texts, for attention that has no cache of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from dilated_core.checks import check_integer
from torch import Tensor

# Room for this many tokens at first; it doubles when it is full.
_FIRST_ROOM = 256


class KeyHistory:
    """The keys and values of all tokens so far; memory and time for a token grow with the text.

    A step runs the attention of the whole text, with zeros for the queries of earlier tokens, and
    keeps the rows of the new ones. Causal attention of a token depends on its own query only.

    Args:
        batch_size: B.
        num_kv_heads: H_kv.
        head_dim: D.
        value_dim: Of the values; `head_dim` if None.
        device: Of the memory.
        dtype: Of q, k and v.
        max_seq_len: Most tokens of a text; None for any number.

    Attributes:
        keys, values: `(B, room, H_kv, D)`; text b has the first `positions[b]` rows.
        positions: Tokens of each text.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int | None = None,
        device: torch.device | str,
        dtype: torch.dtype,
        max_seq_len: int | None,
    ) -> None:
        batch_size = check_integer("batch_size", batch_size, at_least=1)
        if max_seq_len is not None:
            max_seq_len = check_integer("max_seq_len", max_seq_len, at_least=1)
        self.max_seq_len = max_seq_len
        room = _FIRST_ROOM if max_seq_len is None else min(_FIRST_ROOM, max_seq_len)
        shape = (batch_size, room, num_kv_heads, head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        values = head_dim if value_dim is None else value_dim
        self.values = torch.zeros((*shape[:3], values), device=device, dtype=dtype)
        self.positions = (0,) * batch_size

    @property
    def batch_size(self) -> int:
        """B, which `reorder` may change."""
        return len(self.positions)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, with the room for more."""
        return self.keys.nbytes + self.values.nbytes

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        counts: Sequence[int] | None,
        attend: Callable[..., Tensor],
    ) -> Tensor:
        """Append new tokens, and attend from them to all tokens.

        Args:
            q: `(B, n, H, D)`.
            k, v: `(B, n, H_kv, D)`.
            counts: How many of the n tokens of each text are not padding; None: all.
            attend: Attention of q, k and v of a whole text, with the keyword `is_causal`.

        Returns:
            `(B, n, H, D)`, 0 for padding.
        """
        out = torch.zeros_like(q)
        for texts, start, end in self.append(k, v, counts):
            count = end - start
            whole = q.new_zeros(texts.stop - texts.start, end, *q.shape[2:])
            whole[:, start:] = q[texts, :count]
            result = attend(whole, self.keys[texts, :end], self.values[texts, :end], is_causal=True)
            out[texts, :count] = result[:, start:]
        return out

    def append(
        self, k: Tensor, v: Tensor, counts: Sequence[int] | None
    ) -> list[tuple[slice, int, int]]:
        """Store the keys and values of new tokens; the arguments are those of `attend`.

        Returns:
            Neighbouring texts with equally many tokens, before and after: the texts as a slice of
            the batch, and the positions of their new tokens as (start, end). Texts without new
            tokens are left out.
        """
        n = k.shape[1]
        counts = [n] * self.batch_size if counts is None else list(counts)
        ends = [a + b for a, b in zip(self.positions, counts, strict=True)]
        self._make_room(max(ends))
        spans = list(enumerate(zip(self.positions, ends, strict=True)))
        runs: list[tuple[slice, int, int]] = []
        for (start, end), group in groupby(spans, key=lambda item: item[1]):
            first, *others = [text for text, _ in group]
            texts, count = slice(first, first + 1 + len(others)), end - start
            if count == 0:
                continue
            self.keys[texts, start:end] = k[texts, :count]
            self.values[texts, start:end] = v[texts, :count]
            runs.append((texts, start, end))
        self.positions = tuple(ends)
        return runs

    def _make_room(self, length: int) -> None:
        room = self.keys.shape[1]
        if length <= room:
            return
        more = max(length, 2 * room)
        if self.max_seq_len is not None:
            more = min(more, self.max_seq_len)
        padding = (0, 0, 0, 0, 0, more - room)
        self.keys, self.values = (
            torch.nn.functional.pad(x, padding) for x in (self.keys, self.values)
        )

    def reorder(self, batch_indices: Tensor) -> None:
        """Make text i a copy of what text `batch_indices[i]` was."""
        chosen = batch_indices.to(self.keys.device, torch.int64)
        self.keys, self.values = self.keys[chosen], self.values[chosen]
        self.positions = tuple(self.positions[int(i)] for i in batch_indices)

    def reset(self) -> None:
        """Forget all tokens."""
        self.positions = (0,) * self.batch_size
