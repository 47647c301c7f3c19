"""Decoding one token at a time against a cache that does not grow with the context.

B batch, H heads, H_kv heads of k and v, D head_dim, w segment length, r dilation rate.

In each branch a causal query sees keys of its own segment only. So the cache holds, per branch and
head, the rows that the branch keeps of the current segment. The position with index i in a segment
is row i // r, and overwrites the position with the same index of the segment before. A step reads
the rows up to its own, all of which belong to the current segment, and never the rows behind.

Heads that share an offset and a head of k and v share the rows of a branch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch

from dilated_core.backends.cache_layout import MAX_POSITION, index_blocks, plan_blocks
from dilated_core.backends.contract import AttentionInputs
from dilated_core.backends.eager_decoding import append_tokens
from dilated_core.backends.registry import choose_backend
from dilated_core.checks import check_float_dtype, check_integer, check_tensor
from dilated_core.decoding.size import check_sizes
from dilated_core.inputs import check_scale
from dilated_core.merge import AttentionOutput
from dilated_core.pattern.branches import DilatedPattern


class DecodingCache:
    """The keys and values that the next tokens of a causal dilated attention can still see.

    Its memory is allocated once, and does not grow with the context. All sequences of the batch are
    at the same position. A cache can be copied (the copy shares nothing), pickled and saved
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
        position: Tokens seen so far, which is the position of the next one.

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
        self.position = 0
        blocks, rows = plan_blocks(pattern, *sizes)
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
            self._layout = index_blocks(
                pattern, blocks, self.num_heads, self.max_seq_len, self.keys.device
            )

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
        self.position = 0

    def prefill(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Append the keys and values of n tokens at once, as n steps would.

        Copies only the rows that the cache keeps, whatever n is. It returns no attention: for the
        attention of a prompt, call `dilated_attention(..., is_causal=True)`.

        Args:
            k, v: `(B, n, H_kv, D)`, dtype and device of the cache; any n.

        Raises:
            TypeError: If one is no tensor or of another dtype.
            ValueError: If shapes or devices do not fit, the cache would exceed `max_seq_len`, or
                k or v requires a gradient while gradients are enabled.
        """
        n = k.shape[1] if isinstance(k, torch.Tensor) and k.dim() == 4 else 0
        self._check("k", k, n, self.num_kv_heads)
        self._check("v", v, n, self.num_kv_heads)
        self._check_room(n)
        if n:
            with torch.no_grad():
                append_tokens(k, v, self.keys, self.values, self._layout, self.position)
                self.position += n

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
        indices = (
            batch_indices
            if isinstance(batch_indices, torch.Tensor)
            else torch.as_tensor(batch_indices, device="cpu")
        )
        if indices.is_meta:
            raise ValueError("batch_indices is on meta and holds no values; give it on the CPU.")
        if indices.numel() and (indices.dtype == torch.bool or indices.is_floating_point()):
            raise TypeError(f"batch_indices has dtype {indices.dtype}; it must hold integers.")
        if indices.dim() != 1:
            raise ValueError(
                f"batch_indices has shape {tuple(indices.shape)}; it must have one dimension."
            )
        for index in cast(list[int], indices.tolist()):
            if not 0 <= index < self.batch_size:
                raise ValueError(
                    f"batch_indices holds {index}; each must be in [0, B), here B = "
                    f"{self.batch_size}."
                )
        with torch.inference_mode(False), torch.no_grad():
            indices = indices.to(self.keys.device, torch.int64, copy=True)
            # Both first: an error such as too little memory must not leave one of them changed.
            keys = self.keys.index_select(0, indices)
            self.values = self.values.index_select(0, indices)
            self.keys = keys

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Copies of `keys` and `values`, and `position` as an int64 scalar."""
        return {
            "keys": self.keys.clone(),
            "values": self.values.clone(),
            "position": torch.tensor(self.position, device="cpu"),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Load what `state_dict` of a cache with the same arguments returned.

        After an error the cache is what it was before.

        Raises:
            TypeError: If an entry is of the wrong type.
            ValueError: If entries are missing or too many, their shapes or dtypes differ, they hold
                no values, or the position is negative or beyond `max_seq_len`.
        """
        expected = {"keys": self.keys, "values": self.values}
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict is a {type(state_dict).__name__}; it must be a dict.")
        if set(state_dict) != {*expected, "position"}:
            raise ValueError(
                f"state_dict has the entries {sorted(map(str, state_dict))}; it must have keys, "
                f"values and position."
            )
        position: Any = state_dict["position"]
        if isinstance(position, torch.Tensor) and (position.dim() or position.is_meta):
            raise ValueError(
                f"position is a tensor of shape {tuple(position.shape)} on {position.device} in "
                f"state_dict; it must be a single integer on a device that holds values."
            )
        longest = MAX_POSITION if self.max_seq_len is None else self.max_seq_len
        position = check_integer("position", position, at_least=0, at_most=longest)
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
        self.position = position

    def __copy__(self) -> DecodingCache:
        # Two caches must not write to the same memory.
        return copy.deepcopy(self)

    def _decode(
        self, backend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> AttentionOutput:
        """Append one token and attend from it, with a backend that can decode."""
        memory = (self.keys, self.values, self._layout)
        result = backend.decode_forward(q, k, v, *memory, position=self.position, scale=scale)
        self.position += 1
        return result

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

    def _check_room(self, n: int) -> None:
        if self.max_seq_len is not None and self.position + n > self.max_seq_len:
            raise ValueError(
                f"the cache has seen {self.position} tokens and {n} more are given; max_seq_len is "
                f"{self.max_seq_len}, so make it with a larger one."
            )


def decode_step_with_lse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> AttentionOutput:
    """`decode_step` that also returns the log of the softmax denominators.

    Args, errors: As for `decode_step`.

    Returns:
        `out` `(B, 1, H, D)` in the dtype of q, and `lse` `(B, 1, H)`, natural logarithm, float32
        (float64 for float64 inputs); −inf where no branch selects the token.
    """
    if not isinstance(cache, DecodingCache):
        raise TypeError(f"cache is a {type(cache).__name__}; it must be a DecodingCache.")
    cache._check("q", q, 1, cache.num_heads)  # pyright: ignore[reportPrivateUsage]
    cache._check("k", k, 1, cache.num_kv_heads)  # pyright: ignore[reportPrivateUsage]
    cache._check("v", v, 1, cache.num_kv_heads)  # pyright: ignore[reportPrivateUsage]
    scale = check_scale(scale, cache.head_dim)
    cache._check_room(1)  # pyright: ignore[reportPrivateUsage]
    inputs = AttentionInputs(
        q.device, q.dtype, cache.num_heads, cache.head_dim, num_kv_heads=cache.num_kv_heads
    )
    chosen: Any = choose_backend(backend, inputs, for_decoding=True)
    with torch.no_grad(), _without_autocast(q.device.type):
        return cache._decode(chosen, q, k, v, scale)  # pyright: ignore[reportPrivateUsage]


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """No autocast, which would compute the scores in half precision; a no-op on meta."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: DecodingCache,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Append one token to the cache and attend from it: one row of causal dilated attention.

    Equal to the last row of `dilated_attention(..., is_causal=True)` over all tokens that the cache
    has seen. The token sees at most Σ ⌈w/r⌉ keys, so neither time nor memory grows with the
    context. For inference: it returns no gradient.

    Args:
        q: `(B, 1, H, D)`, dtype and device of the cache.
        k, v: `(B, 1, H_kv, D)`, of the same token.
        cache: The cache of the tokens before. Changed in place, unless an error is raised.
        scale: Factor of the scores, the same at every step; 1/√D if None.
        backend: Name of a backend that can decode, such as "eager" or "triton", or "auto" for the
            best that can run here. A named backend is never replaced by another one.

    Returns:
        `(B, 1, H, D)` in the dtype of q; 0 where no branch selects the token.

    Raises:
        TypeError: If an argument has the wrong type or another dtype than the cache.
        ValueError: If shapes or devices do not fit, the cache would exceed its `max_seq_len`, the
            scale is not finite, q, k or v requires a gradient while gradients are enabled, or the
            named backend does not exist or cannot decode these.

    Example:
        >>> pattern = DilatedPattern([4, 16], [1, 2])
        >>> q, k, v = torch.randn(3, 1, 50, 2, 8).unbind()
        >>> cache = DecodingCache(pattern, batch_size=1, num_heads=2, head_dim=8)
        >>> outs = [decode_step(q[:, [t]], k[:, [t]], v[:, [t]], cache) for t in range(50)]
        >>> whole = dilated_attention(q, k, v, pattern, is_causal=True)
        >>> torch.testing.assert_close(torch.cat(outs, 1), whole)
    """
    return decode_step_with_lse(q, k, v, cache, scale=scale, backend=backend).out
