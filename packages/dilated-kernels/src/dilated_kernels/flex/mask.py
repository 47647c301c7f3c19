"""The pattern for flex_attention: functions of indices, and a summary of blocks.

PyTorch calls the functions with b batch, h head of q, i query, j key; S positions, H heads. Nothing
here allocates S x S elements, except PyTorch itself where it cannot compile (CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern
from dilated_core.backends.contract import AttentionOptions
from dilated_core.inputs import document_bounds

# Each pattern, length and dtype compiles its own kernel. Beyond its limit of kernels, 8 by default,
# PyTorch falls back to an unfused product of all queries and keys.
_MAX_KERNELS = 256

Mod = Callable[..., torch.Tensor]


class Mask(NamedTuple):
    """Which keys a query sees, and how often.

    Attributes:
        block_mask: Which, as PyTorch's `BlockMask`; None if it sees every key.
        score_mod: (score, b, h, i, j) -> score + log(how often); None if every seen key counts
            once.
        has_any_size: Whether one compiled kernel serves all lengths and lists of blocks.
        kernel_options: PyTorch's options of the kernel; None for its own choice.
    """

    block_mask: Any
    score_mod: Mod | None
    has_any_size: bool = False
    kernel_options: dict[str, Any] | None = None


class Documents(NamedTuple):
    """The documents of a packed sequence.

    Attributes:
        first: `(T,)` int32, the first position of each position's document.
        length: `(T,)` int32, the length of each position's document.
    """

    first: torch.Tensor
    length: torch.Tensor


def documents_of(cu_seqlens: torch.Tensor | None, q: torch.Tensor) -> Documents | None:
    """The documents of q `(1, T, H, D)`, or None if it is not packed.

    Raises:
        ValueError: If `cu_seqlens` does not rise from 0 to T.
    """
    if cu_seqlens is None:
        return None
    num_positions = q.shape[1]
    document_bounds(cu_seqlens, num_positions)
    bounds = cu_seqlens.to(q.device, torch.int32)
    lengths = bounds.diff()
    first, length = (
        x.repeat_interleave(lengths, output_size=num_positions) for x in (bounds[:-1], lengths)
    )
    return Documents(first, length)


def pattern_mask(
    pattern: DilatedPattern,
    q: torch.Tensor,
    *,
    is_causal: bool,
    documents: Documents | None,
    key_padding_mask: torch.Tensor | None,
) -> Mask:
    """The pattern over q `(B, S, H, D)`.

    Args:
        pattern: The branches.
        q: For its shape and device.
        is_causal: Whether keys behind the query are left out.
        documents: If packed.
        key_padding_mask: `(B, S)`, True for keys to leave out, or None.
    """
    B, S, H, _ = q.shape
    if documents is None and key_padding_mask is None:
        return _plain_pattern_mask(pattern, S, H, is_causal, q.device)
    first = None if documents is None else documents.first
    hidden = key_padding_mask
    mask_mod, score_mod = _pattern_mods(pattern, S, H, is_causal, first, hidden)
    batch = None if hidden is None else B
    return Mask(_block_mask(mask_mod, batch, _heads(pattern, H), S, S, q.device), score_mod)


def strip_mask(q: torch.Tensor, k: torch.Tensor, options: AttentionOptions) -> Mask:
    """Ordinary attention of q `(B, M, H, D)` over k `(B, N, H_kv, D)`.

    Args:
        q, k: For their shapes and device.
        options: As for `AttentionBackend.forward`.
    """
    is_causal, hidden = options.is_causal, options.key_padding_mask
    if not is_causal and hidden is None:
        return Mask(None, None)
    B, M, H, _ = q.shape
    group = H // k.shape[2]

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        seen = i >= j if is_causal else j >= 0
        return seen if hidden is None else seen & ~hidden[b, j, h // group]

    batch, heads = (None, None) if hidden is None else (B, H)
    return Mask(_block_mask(mask_mod, batch, heads, M, k.shape[1], q.device), None)


def zero_keys(
    pattern: DilatedPattern, q: torch.Tensor, documents: Documents | None
) -> torch.Tensor:
    """How many zero keys each query sees under `padding="attended"`: int64 `(S, H)`."""
    _, S, H, _ = q.shape
    position = torch.arange(S, device=q.device)
    length = torch.full_like(position, S)
    if documents is not None:
        position, length = position - documents.first, documents.length.long()
    head = torch.arange(H, device=q.device)
    total = torch.zeros(S, H, dtype=torch.int64, device=q.device)
    for segment_length, rate in _clipped(pattern, S, H):
        w = length.clamp(max=segment_length)
        index = position % w
        rows_of_segment = w.minimum(length - (position - index))
        offset = _offset(pattern, head, rate, H)
        kept = (index % rate)[:, None] == offset
        # Offsets are below the rate, so this is never negative.
        present = (rows_of_segment[:, None] - offset + rate - 1) // rate
        total += kept * (((w + rate - 1) // rate)[:, None] - present)
    return total


def is_compiled(kind: str) -> bool:
    """Whether flex_attention is compiled on this type of device.

    On CPU it is eager: its compiled kernel returns no lse. Eager flex_attention evaluates the mask
    for all pairs of positions and reads no list of blocks.
    """
    return kind != "cpu"


@contextmanager
def many_kernels() -> Generator[None]:
    """Let the compiler keep a kernel for each of many patterns and shapes."""
    import torch._dynamo.config

    with torch._dynamo.config.patch(recompile_limit=_MAX_KERNELS):
        yield


@contextmanager
def one_kernel_for_sizes() -> Generator[None]:
    """Let a kernel that is compiled with `dynamic=True` serve all lengths and lists of blocks.

    By itself the compiler takes two sizes that are equal in the first call, such as a number of
    heads and the longest row of blocks, for one. It would also make the scale an argument; the
    kernels need it as a constant.
    """
    import torch._dynamo.config
    import torch.fx.experimental._config as shapes

    with (
        torch._dynamo.config.patch(recompile_limit=_MAX_KERNELS, specialize_float=True),
        shapes.patch(use_duck_shape=False),  # pyright: ignore
    ):
        yield


@lru_cache(maxsize=64)
def _plain_pattern_mask(
    pattern: DilatedPattern, S: int, H: int, is_causal: bool, device: torch.device
) -> Mask:
    """Cached: without documents and padding, the mask depends on sizes alone."""
    mask_mod, score_mod = _pattern_mods(pattern, S, H, is_causal, None, None)
    return Mask(_block_mask(mask_mod, None, _heads(pattern, H), S, S, device), score_mod)


def _pattern_mods(
    pattern: DilatedPattern,
    S: int,
    H: int,
    is_causal: bool,
    first: torch.Tensor | None,
    hidden: torch.Tensor | None,
) -> tuple[Mod, Mod | None]:
    branches = _clipped(pattern, S, H)

    def count(h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """How many branches let query i of head h see key j, causality and masks apart."""
        if first is not None:
            i, j = i - first[i], j - first[j]
        total = torch.zeros_like(i + j)
        for w, r in branches:
            offset = _offset(pattern, h, r, H)
            is_selected = (i // w == j // w) & (i % w % r == offset) & (j % w % r == offset)
            total = total + is_selected.to(total.dtype)
        return total

    def mask_mod(
        b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        seen = count(h, i, j) > 0
        if is_causal:
            seen = seen & (i >= j)
        if first is not None:
            seen = seen & (first[i] == first[j])
        if hidden is not None:
            seen = seen & ~hidden[b, j]
        return seen

    def score_mod(
        score: torch.Tensor, b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor
    ) -> torch.Tensor:
        times = count(h, i, j).to(torch.promote_types(score.dtype, torch.float32))
        return score + times.log()

    return mask_mod, score_mod if len(branches) > 1 else None


def _clipped(pattern: DilatedPattern, S: int, H: int) -> list[tuple[int, int]]:
    """The branches with numbers that fit 32-bit indices.

    A segment beyond S selects the same keys as one of S. A rate beyond S and H keeps one position
    of a segment, at the head's offset, as a rate of exactly that size does.
    """
    return [(min(w, S), min(r, max(S, H))) for w, r in pattern.branches]


def _offset(pattern: DilatedPattern, head: torch.Tensor, rate: int, H: int) -> torch.Tensor:
    return head % rate if pattern.head_offsets == "interleaved" else head // -(-H // rate)


def _heads(pattern: DilatedPattern, H: int) -> int | None:
    """The number of heads with different masks; None if all heads have the same."""
    return H if max(pattern.dilation_rates) > 1 else None


def _block_mask(
    mask_mod: Mod, B: int | None, H: int | None, M: int, N: int, device: torch.device
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if device.type == "cpu":
        return create_block_mask(mask_mod, B, H, M, N, device="cpu")
    with many_kernels():
        # Compiled, it evaluates the positions of one block at a time and stores none of them.
        return torch.compile(create_block_mask)(mask_mod, B, H, M, N, device=str(device))
