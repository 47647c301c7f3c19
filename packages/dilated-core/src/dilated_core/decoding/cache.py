"""The keys and values that decoding keeps: a cache that does not grow with the context.

B batch, H heads, H_kv heads of k and v, D head_dim, w segment length, r dilation rate.

In each branch a causal query sees keys of its own segment only. So the cache holds, per branch and
head, the rows that the branch keeps of the current segment. The position with index i in a segment
is row i // r, and overwrites the position with the same index of the segment before. A step reads
the rows up to its own, all of which belong to the current segment, and never the rows behind.

Heads that share an offset and a head of k and v share the rows of a branch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

import torch

from dilated_core.backends.cache_layout import MAX_POSITION, index_sections, plan_sections
from dilated_core.backends.eager_decoding import append_tokens
from dilated_core.checks import (
    check_float_dtype,
    check_integer,
    check_integers,
    check_tensor,
    is_listed,
)
from dilated_core.decoding.size import check_sizes
from dilated_core.pattern.branches import DilatedPattern


class DecodingCache:
    """The keys and values that the next tokens of a causal dilated attention can still see.

    Its memory is allocated once, and does not grow with the context. Each sequence of the batch has
    a position of its own. A cache can be copied (the copy shares nothing), pickled and saved
    (`state_dict`). It carries no gradients.

    Args:
        pattern: The branches. Causal queries see no zero keys, so `padding` makes no difference.
        batch_size: B.
        num_heads: H.
        num_kv_heads: H_kv, which divides H; H if None.
        head_dim: D.
        device: As for `torch.zeros`.
        dtype: As for `torch.zeros`; a floating-point dtype.
        max_seq_len: Most tokens that the cache will see, if known. Longer segments then need no
            more memory than this many tokens, and a token beyond is an error. None: any number.
        head_range: `(first, total)` if the cache is for H heads of a larger attention: heads first
            to first + H − 1 of `total`, whose offsets they have. H_kv counts the heads of k and v
            that these H read. None: the H heads are all, as with (0, H).

    Attributes:
        keys, values: `(B, rows, D)`, where rows is `decoding_cache_rows(...)`.

    Raises:
        TypeError: If `pattern` is no DilatedPattern, a size is no integer, `dtype` not floating or
            `head_range` no pair of integers.
        ValueError: If a size is out of range, H_kv does not divide H, the heads reach beyond the
            total, or the cache would take more bytes than a tensor can have.

    Example:
        >>> pattern = DilatedPattern([64, 256], [1, 4])
        >>> cache = DecodingCache(pattern, batch_size=1, num_heads=4, head_dim=16)
        >>> k, v = torch.randn(2, 1, 1000, 4, 16).unbind()
        >>> cache.prefill(k, v)
        >>> q_next, k_next, v_next = torch.randn(3, 1, 1, 4, 16).unbind()
        >>> decode_step(q_next, k_next, v_next, cache).shape
        torch.Size([1, 1, 4, 16])
        >>> cache.position
        1001
    """

    def __init__(
        self,
        pattern: DilatedPattern,
        *,
        batch_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        max_seq_len: int | None = None,
        head_range: tuple[int, int] | None = None,
    ) -> None:
        sizes = check_sizes(pattern, num_heads, num_kv_heads, max_seq_len, head_range)
        batch_size = check_integer("batch_size", batch_size, at_least=0)
        head_dim = check_integer("head_dim", head_dim, at_least=1)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        check_float_dtype(dtype)
        self.pattern = pattern
        self.num_heads, self.num_kv_heads, self.max_seq_len, self.head_range = sizes
        self._positions = [0] * batch_size
        sections, rows = plan_sections(pattern, *sizes)
        if (nbytes := max(1, batch_size) * rows * head_dim * dtype.itemsize) >= 2**63:
            raise ValueError(
                f"the keys of this cache would take {nbytes} bytes, more than a tensor can have; "
                f"give max_seq_len, or shorter segments or larger dilation rates."
            )
        # A cache made in inference mode can be used outside of it.
        with torch.inference_mode(False), torch.no_grad():
            # Zeros, not what was in memory: rows that are never read may be saved.
            shape = (batch_size, rows, head_dim)
            self.keys = torch.zeros(shape, device=device, dtype=dtype)
            self.values = torch.zeros_like(self.keys)
            self._layout = index_sections(
                pattern, sections, self.num_heads, self.max_seq_len, self.keys.device
            )

    @property
    def positions(self) -> tuple[int, ...]:
        """Tokens that each sequence has seen, which is the position of its next token."""
        return tuple(self._positions)

    @property
    def position(self) -> int:
        """The position of all sequences; 0 if there is no sequence.

        Raises:
            ValueError: If the sequences are at different positions.
        """
        first, *others = self._positions or [0]
        if any(position != first for position in others):
            raise ValueError(
                f"the sequences are at the positions {self.positions}, so they have no common "
                f"position; read cache.positions."
            )
        return first

    @property
    def batch_size(self) -> int:
        """B, which `reorder` may change."""
        return self.keys.shape[0]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.keys.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of `keys` and `values`."""
        return self.keys.nbytes + self.values.nbytes

    def reset(self) -> None:
        """Forget all tokens and start again at position 0, in the same memory."""
        self._positions = [0] * self.batch_size

    def prefill(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        lengths: torch.Tensor | Sequence[int] | None = None,
    ) -> None:
        """Append the keys and values of n tokens at once, as n steps would.

        Copies only the rows that the cache keeps, whatever n is. It returns no attention: use
        `decode_tokens` for that, or for a prompt `dilated_attention(..., is_causal=True)`.

        Args:
            k, v: `(B, n, H_kv, D)`, dtype and device of the cache; any n.
            lengths: B integers in [0, n]: of sequence b the first `lengths[b]` tokens are appended,
                and the others are padding. None: all n of each sequence.

        Raises:
            TypeError: If k or v is no tensor or of another dtype, or a length is no integer.
            ValueError: If shapes or devices do not fit, a length is out of range, the cache would
                exceed `max_seq_len`, or k or v requires a gradient while gradients are enabled.
        """
        n = k.shape[1] if isinstance(k, torch.Tensor) and k.dim() == 4 else 0
        self._check("k", k, n, self.num_kv_heads)
        self._check("v", v, n, self.num_kv_heads)
        counts = self._check_lengths(lengths, n)
        self._check_room(counts)
        self._append(k, v, counts)

    def reorder(self, batch_indices: torch.Tensor | Sequence[int]) -> None:
        """Make batch row i a copy of what batch row `batch_indices[i]` was, as beam search does.

        Args:
            batch_indices: Integers in [0, B), of one dimension. Their number becomes the batch
                size, so one prompt can continue as several beams.

        Raises:
            TypeError: If it holds anything but integers.
            ValueError: If it does not have one dimension, an index is out of range, or it is on
                the meta device and holds no values.
        """
        chosen = check_batch_indices(batch_indices, self.batch_size)
        with torch.inference_mode(False), torch.no_grad():
            indices = torch.tensor(chosen, dtype=torch.int64, device=self.keys.device)
            # Both first: an error such as too little memory must not leave one of them changed.
            keys = self.keys.index_select(0, indices)
            self.values = self.values.index_select(0, indices)
            self.keys = keys
            self._positions = [self._positions[index] for index in chosen]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of `keys` and `values`, and `positions` as an int64 tensor of B."""
        return {
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "positions": torch.tensor(self._positions, dtype=torch.int64, device="cpu"),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` of a cache with the same arguments returned.

        After an error the cache is what it was before.

        Raises:
            TypeError: If an entry is of the wrong type.
            ValueError: If entries are missing or too many, their shapes or dtypes differ, they hold
                no values, or a position is negative or beyond `max_seq_len`.
        """
        expected = {"keys": self.keys, "values": self.values}
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; it must be a dict.")
        if set(state_dict) != {*expected, "positions"}:
            raise ValueError(
                f"state_dict has the entries {sorted(map(str, state_dict))}; it must have keys, "
                f"values and positions."
            )
        longest = MAX_POSITION if self.max_seq_len is None else self.max_seq_len
        positions = check_integers(
            "positions", state_dict["positions"], self.batch_size, at_most=longest
        )
        for name, ours in expected.items():
            given = state_dict[name]
            check_tensor(name, given)
            if given.is_meta and not ours.is_meta:
                raise ValueError(
                    f"{name} is on meta in state_dict and holds no values; load the file with "
                    f"another map_location."
                )
            if given.shape != ours.shape or given.dtype != ours.dtype:
                raise ValueError(
                    f"{name} is {tuple(given.shape)} of {given.dtype} in state_dict and "
                    f"{tuple(ours.shape)} of {ours.dtype} here; make the cache with the same "
                    f"arguments."
                )
        for name, ours in expected.items():
            ours.copy_(state_dict[name])
        self._positions = positions

    def __copy__(self) -> DecodingCache:
        # Two caches must not write to the same memory.
        return copy.deepcopy(self)

    def _append(self, k: torch.Tensor, v: torch.Tensor, counts: Sequence[int]) -> None:
        """Store the first `counts[b]` tokens of each sequence b; the arguments are checked."""
        with torch.no_grad():
            for rows, position, count in self._runs(counts):
                if count:
                    append_tokens(
                        *(k[rows, :count], v[rows, :count], self.keys[rows], self.values[rows]),
                        self._layout,
                        position,
                    )
        self._positions = [p + n for p, n in zip(self._positions, counts, strict=True)]

    def _runs(self, counts: Sequence[int]) -> Iterator[tuple[slice, int, int]]:
        """Neighbouring sequences at one position that get equally many tokens.

        A run is a slice of the batch, so that its part of the cache is a view.
        """
        start = 0
        for key, run in groupby(zip(self._positions, counts, strict=True)):
            stop = start + len(list(run))
            yield slice(start, stop), *key
            start = stop

    def _check(self, name: str, x: torch.Tensor, n: int, heads: int) -> None:
        """Check one tensor of a step or of a prompt."""
        check_tensor(name, x)
        expected = (self.batch_size, n, heads, self.head_dim)
        if x.shape != expected:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must be {expected}: the cache's batch "
                f"size, the new tokens, the heads and head_dim."
            )
        if x.dtype != self.keys.dtype:
            raise TypeError(
                f"{name} has dtype {x.dtype} and the cache {self.keys.dtype}; they must be equal, "
                f"so make the cache with dtype={x.dtype} or convert {name}."
            )
        if x.device != self.keys.device:
            raise ValueError(
                f"{name} is on {x.device} and the cache on {self.keys.device}; they must be on "
                f"one device."
            )
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name} requires a gradient, which a cache cannot carry; decode under "
                f"torch.no_grad() or pass {name}.detach()."
            )

    def _check_lengths(self, lengths: torch.Tensor | Sequence[int] | None, n: int) -> list[int]:
        B = self.batch_size
        return [n] * B if lengths is None else check_integers("lengths", lengths, B, at_most=n)

    def _check_room(self, counts: Sequence[int]) -> None:
        for position, n in zip(self._positions, counts, strict=True):
            if self.max_seq_len is not None and position + n > self.max_seq_len:
                raise ValueError(
                    f"the cache has seen {position} tokens and {n} more are given; max_seq_len is "
                    f"{self.max_seq_len}, so make it with a larger one."
                )


def check_batch_indices(batch_indices: torch.Tensor | Sequence[int], batch_size: int) -> list[int]:
    """`batch_indices` as a list of integers in [0, B).

    Raises:
        TypeError: If it holds anything but integers.
        ValueError: If it does not have one dimension, an index is out of range, or it is on the
            meta device and holds no values.
    """
    given: Any = batch_indices
    if isinstance(given, torch.Tensor):
        if given.is_meta:
            raise ValueError("batch_indices is on meta and holds no values; give it on the CPU.")
        if given.numel() and (given.dtype == torch.bool or given.is_floating_point()):
            raise TypeError(f"batch_indices has dtype {given.dtype}; it must hold integers.")
        if given.dim() != 1:
            raise ValueError(
                f"batch_indices has shape {tuple(given.shape)}; it must have one dimension."
            )
        given = cast(Any, given.tolist())
    if not is_listed(given):
        raise TypeError(
            f"batch_indices is a {type(given).__name__}; it must be a tensor or a list of integers."
        )
    chosen = [check_integer("an entry of batch_indices", index) for index in given]
    for index in chosen:
        if not 0 <= index < batch_size:
            raise ValueError(
                f"batch_indices holds {index}; each must be in [0, B), here B = {batch_size}."
            )
    return chosen
