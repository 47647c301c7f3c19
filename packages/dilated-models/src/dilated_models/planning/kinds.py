"""Attention of a block by its kind: pairs of queries and keys, and matrix products beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from dilated_core import DilatedPattern

from dilated_models.attention_kinds import options_with_defaults
from dilated_models.config import LongNetConfig
from dilated_models.layers.position_codes import alibi_head_dim


class Branch(NamedTuple):
    """Attention within segments of equal length.

    Attributes:
        rows: Rows of a segment that attend to one another.
        flops: In forward, of a rank.
        share: Share of all rows that the branch keeps.
    """

    rows: int
    flops: float
    share: float


class Product(NamedTuple):
    """Matrix products of attention, beside the projections that every kind has.

    Attributes:
        name: For tables.
        m, k, n: Their sizes.
        times: How many.
        calls: In how many operations.
        backward: FLOPs of the backward pass over those of forward: two products for the gradients
            of both factors.
    """

    name: str
    m: float
    k: int
    n: float
    times: float = 1
    calls: float = 1
    backward: float = 2.0

    @property
    def flops(self) -> float:
        """In forward."""
        return 2.0 * self.m * self.k * self.n * self.times


def channels(model: LongNetConfig, dtype: str) -> int:
    """Channels of a head of q, k and v: ALiBi adds some to those of the model."""
    if model.positions != "alibi":
        return model.head_dim
    return alibi_head_dim(model.head_dim, getattr(torch, dtype))


def has_bounded_cache(model: LongNetConfig) -> bool:
    """Whether generation keeps a `DecodingCache`, whose size does not grow with the text."""
    return model.has_branches and not model.local_window


def attention_options(model: LongNetConfig) -> Any:
    """The options of a kind without branches, with their defaults."""
    return options_with_defaults(model.attention_kind, dict(model.attention_options))


def branches_of(
    model: LongNetConfig, seq_len: int, rows: int, dtype: str, *, is_causal: bool = True
) -> tuple[Branch, ...]:
    """The pairs of a block's attention, as FLOPs.

    Args:
        model: The model.
        seq_len: Tokens of a sequence.
        rows: Sequences.
        dtype: Of q, k and v.
        is_causal: Whether a token sees only earlier ones. Kinds without branches are causal here.

    Raises:
        ImportError: If a window is given and dilated-sparse is not installed.
    """
    if model.has_branches:
        if model.local_window:
            return _of_window(model, seq_len, rows, is_causal)
        head_dim = channels(model, dtype)
        return of_pattern(model, model.pattern, seq_len, rows, head_dim, is_causal=is_causal)
    from dilated_sparse.pattern.pairs import pairs_of_budget

    options = attention_options(model)
    if model.attention_kind == "nsa":
        return _of_nsa(model, options.sizes, seq_len, rows)
    size: int = options.block_size
    if model.attention_kind == "moba":
        return (Branch(size, _flops(model, rows, _chosen(seq_len, size, options.topk)), 1.0),)
    if model.attention_kind == "block_sparse":
        pairs = pairs_of_budget(seq_len, size, ratio=options.sparsity_ratio)
    else:
        from dilated_models.planning.adaptive import pairs_of_adaptive

        pairs = pairs_of_adaptive(options, seq_len)
    return (Branch(size, _flops(model, rows, pairs), 1.0),)


def products_of(
    model: LongNetConfig, seq_len: int, rows: int, *, learns: bool
) -> tuple[Product, ...]:
    """The matrix products of a block's attention beside pairs and projections.

    Args:
        model: The model.
        seq_len: Tokens of a sequence.
        rows: Sequences.
        learns: Whether a gate learns, as in training.
    """
    if model.has_branches or model.attention_kind == "block_sparse":
        return ()
    options = attention_options(model)
    if model.attention_kind == "nsa":
        return _products_of_nsa(model, options, seq_len, rows)
    if model.attention_kind == "moba":
        means = seq_len // options.block_size
        return (
            Product(
                "choice of blocks", seq_len, model.head_dim, means, rows * model.nhead, backward=0
            ),
        )
    from dilated_models.planning.adaptive import products_of_adaptive

    return products_of_adaptive(model, options, seq_len, rows, learns=learns)


def dense_branches(
    model: LongNetConfig, seq_len: int, rows: int, *, head_dim: int
) -> tuple[Branch, ...]:
    """Causal attention to all keys."""
    return of_pattern(model, DilatedPattern([seq_len], [1]), seq_len, rows, head_dim)


def of_pattern(
    model: LongNetConfig,
    pattern: DilatedPattern,
    seq_len: int,
    rows: int,
    head_dim: int,
    *,
    is_causal: bool = True,
) -> tuple[Branch, ...]:
    """The branches of a pattern."""
    branches: list[Branch] = []
    for w, r in pattern.branches:
        alone = DilatedPattern([w], [r], head_offsets=pattern.head_offsets)
        flops = alone.flops(seq_len, model.nhead, head_dim, batch_size=rows, is_causal=is_causal)
        kept = max(1, min(w, seq_len) // r)
        branches.append(Branch(kept, flops, min(1.0, 1 / r)))
    return tuple(branches)


def _flops(model: LongNetConfig, rows: int, pairs: float) -> float:
    """Of pairs of query and key of each head, of each of `rows` sequences."""
    return 4.0 * rows * model.nhead * model.head_dim * pairs


def _of_window(
    model: LongNetConfig, seq_len: int, rows: int, is_causal: bool
) -> tuple[Branch, ...]:
    """The window, and of each branch the pairs that lie beyond the window."""
    try:
        from dilated_sparse.windowed.pairs import windowed_pairs
    except ModuleNotFoundError as error:
        raise ImportError(
            f"local_window needs dilated-sparse, and {error.name} is not installed: "
            f"pip install 'dilated-models[sparse]'"
        ) from error

    def flops(pattern: DilatedPattern | None) -> float:
        pairs = windowed_pairs(
            pattern, model.local_window, seq_len, model.nhead, is_causal=is_causal
        )
        return 4.0 * rows * model.head_dim * pairs

    near = flops(None)
    branches = [
        Branch(
            max(1, min(w, seq_len) // r),
            flops(DilatedPattern([w], [r], head_offsets=model.head_offsets)) - near,
            min(1.0, 1 / r),
        )
        for w, r in model.pattern.branches
    ]
    return (Branch(min(model.local_window, seq_len), near, 1.0), *branches)


def _chosen(seq_len: int, block_size: int, count: int) -> int:
    """Pairs of a head whose queries see their own block and `count` − 1 earlier full ones."""
    num_blocks = -(-seq_len // block_size)
    tail = seq_len - (num_blocks - 1) * block_size
    own = (num_blocks - 1) * block_size * (block_size + 1) // 2 + tail * (tail + 1) // 2
    # A query in block b sees min(count − 1, b) whole blocks before its own one.
    few = min(count - 1, num_blocks)
    earlier = few * (few - 1) // 2 + (count - 1) * max(0, num_blocks - few)
    of_tail = min(count - 1, num_blocks - 1)
    return own + (earlier - of_tail) * block_size**2 + of_tail * block_size * tail


def _of_nsa(model: LongNetConfig, sizes: Any, seq_len: int, rows: int) -> tuple[Branch, ...]:
    """Compressed keys in a staircase, chosen blocks, and the window."""
    from dilated_sparse.windowed.pairs import windowed_pairs

    compressed: int = sizes.num_compressed(seq_len)
    stairs = sizes.compression_stride * compressed * (compressed + 1) // 2
    chosen = _chosen(seq_len, sizes.selection_block_size, sizes.num_selected_blocks)
    near = windowed_pairs(None, sizes.window_size, seq_len, 1, is_causal=True)
    return (
        Branch(max(1, compressed), _flops(model, rows, stairs), 1.0),
        Branch(sizes.selection_block_size, _flops(model, rows, chosen), 1.0),
        Branch(min(sizes.window_size, seq_len), _flops(model, rows, near), 1.0),
    )


def _products_of_nsa(
    model: LongNetConfig, options: Any, seq_len: int, rows: int
) -> tuple[Product, ...]:
    sizes, tokens = options.sizes, rows * seq_len
    D, H, compressed = model.head_dim, model.nhead, sizes.num_compressed(seq_len)
    blocks = rows * compressed * (model.num_kv_heads or H)
    found = [
        # Three branches have keys and values of their own; one is counted with the projections.
        Product("keys and values of branches", tokens, model.d_model, 2 * model.kv_dim, 2, 2),
        Product("compression", blocks, sizes.compression_block_size * D, 2 * D, 2, 2),
        Product("compression", blocks, 2 * D, D, 2, 2),
        Product("choice of blocks", seq_len, D, compressed, rows * H, backward=0),
    ]
    if options.mix == "gate":
        hidden = max(1, model.d_model // 4)
        found += [
            Product("gate", tokens, model.d_model, hidden),
            Product("gate", tokens, hidden, 3 * H),
            Product("sum of branches", D, 3, 1, tokens * H),
        ]
    return tuple(product for product in found if product.flops)
