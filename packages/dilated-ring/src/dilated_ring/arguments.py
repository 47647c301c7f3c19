"""The arguments of attention over ranks: checked, and the spans that the ranks hold."""

from __future__ import annotations

import zlib
from itertools import accumulate, pairwise
from typing import NamedTuple, get_args

import torch
from dilated_core import DilatedPattern, Span
from dilated_core.checks import check_bool, check_choice, check_head_range, check_integer
from dilated_core.inputs import (
    check_backend_name,
    check_cu_seqlens,
    check_dropout,
    check_inputs,
    check_key_padding_mask,
    check_scale,
)
from dilated_core.pattern.branches import check_pattern

from dilated_ring.layout import LAYOUTS, Layout, joined, num_positions, spans_of_ranks
from dilated_ring.plan.blocks import (
    BlocksForLength,
    KeptBlocks,
    Pattern,
    checked_blocks,
)
from dilated_ring.plan.exchange import ExchangeKind
from dilated_ring.plan.sequences import Spans

EXCHANGES: tuple[str, ...] = get_args(ExchangeKind)


class BlockArguments(NamedTuple):
    """What determines the keys of block-sparse attention, as users give it."""

    pattern: KeptBlocks | BlocksForLength
    block_size: int | None


class Options(NamedTuple):
    """The checked options of a call, equal on all ranks."""

    pattern: Pattern
    is_causal: bool
    layout: Layout
    exchange: ExchangeKind
    scale: float
    dropout_p: float
    head_range: tuple[int, int]
    backend: str
    tile_size: int | None


Arguments = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, DilatedPattern | BlockArguments, bool, Layout,
    ExchangeKind, float | None, float, torch.Tensor | None, torch.Tensor | None,
    tuple[int, int] | None, str, int | None,
]  # fmt: skip
"""The arguments of `check_arguments`, as users give them."""


def check_arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: DilatedPattern | BlockArguments,
    is_causal: bool,
    layout: Layout,
    exchange: ExchangeKind,
    scale: float | None,
    dropout_p: float,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    head_range: tuple[int, int] | None,
    backend: str,
    tile_size: int | None,
) -> Options:
    """Check the arguments of one rank, and return the options that all ranks must share.

    Raises:
        TypeError, ValueError: As for `ring_dilated_attention`, for mistakes that one rank can find.
    """
    check_bool("is_causal", is_causal)
    check_choice("layout", layout, LAYOUTS)
    check_choice("exchange", exchange, EXCHANGES)
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens)
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask and cu_seqlens are both given; packed documents have no padding, "
                "so give one of the two."
            )
    if not isinstance(pattern, BlockArguments):
        check_pattern(pattern)
    check_inputs(q, k, v, is_packed=cu_seqlens is not None)
    check_backend_name(backend)
    kept = pattern
    if isinstance(kept, BlockArguments):
        kept = checked_blocks(*kept)
    if key_padding_mask is not None:
        check_key_padding_mask(key_padding_mask, q)
    return Options(
        kept,
        is_causal,
        layout,
        exchange,
        check_scale(scale, q.shape[-1]),
        check_dropout(dropout_p),
        check_head_range(head_range, q.shape[-2]),
        backend,
        check_tile_size(tile_size, exchange),
    )


def check_tile_size(tile_size: int | None, exchange: ExchangeKind) -> int | None:
    """The checked size of a tile.

    Raises:
        TypeError, ValueError: If it is no positive integer, or the exchange has no tiles.
    """
    if tile_size is None:
        return None
    if exchange == "all_to_all":
        raise ValueError(
            f"tile_size is {tile_size} and exchange 'all_to_all', where each rank attends to all "
            f"positions at once; use another exchange, or leave out tile_size."
        )
    return check_integer("tile_size", tile_size, at_least=1)


def describe(
    options: Options,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> dict[str, str]:
    """What must be equal on all ranks, by the name of the argument."""
    description = {"arguments": "valid"}
    description |= {name: str(value) for name, value in options._asdict().items()}
    shapes = [(*x.shape[:-3], "L", *x.shape[-2:]) for x in (q, k)]
    description["shapes of q and k"] = ", ".join(
        f"({', '.join(map(str, shape))})" for shape in shapes
    )
    description["dtype"] = str(q.dtype)
    description["key_padding_mask"] = "None" if key_padding_mask is None else "given"
    description["cu_seqlens"] = "None" if cu_seqlens is None else _summary(cu_seqlens)
    # A rank that does not run backward would leave the others waiting.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    description["requires_grad of q, k or v"] = str(needs_grad)
    return description


def _summary(cu_seqlens: torch.Tensor) -> str:
    numbers = cu_seqlens.to("cpu", torch.int64)
    digest = zlib.crc32(numbers.numpy().tobytes())
    return f"{len(numbers) - 1} documents up to {int(numbers[-1])} with checksum {digest:08x}"


def spans_of_lengths(
    layout: Layout,
    size: int,
    rank: int,
    local_len: int,
    lengths: list[int] | None,
    seq_len: int | None,
) -> Spans:
    """The spans of all ranks.

    Raises:
        ValueError: If the lengths are not those of the layout.
    """
    if lengths is not None and seq_len is not None and sum(lengths) != seq_len:
        raise ValueError(
            f"seq_len is {seq_len} and the ranks hold {sum(lengths)} positions together; pass "
            f"their sum, or leave seq_len out."
        )
    if layout == "contiguous" and lengths is not None:
        bounds = accumulate(lengths, initial=0)
        return tuple(joined([Span(a, b)]) for a, b in pairwise(bounds))
    if seq_len is None:
        assert lengths is not None
        seq_len = sum(lengths)
    spans = spans_of_ranks(layout, seq_len, size)
    for i, held in enumerate(spans):
        length = local_len if i == rank else lengths[i] if lengths is not None else None
        if length is not None and length != num_positions(held):
            raise ValueError(
                f"rank {i} holds {length} positions; of {seq_len} in the layout {layout!r} over "
                f"{size} ranks it holds {num_positions(held)}, so cut them with shard_sequence."
            )
    return spans
