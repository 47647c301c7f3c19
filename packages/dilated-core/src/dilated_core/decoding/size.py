"""How much a decoding cache holds: arithmetic on integers."""

from __future__ import annotations

import torch

from dilated_core.backends.cache_layout import plan_sections
from dilated_core.checks import (
    check_float_dtype,
    check_head_groups,
    check_head_range,
    check_integer,
)
from dilated_core.pattern.branches import DilatedPattern, check_pattern


def decoding_cache_rows(
    pattern: DilatedPattern,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    max_seq_len: int | None = None,
    head_range: tuple[int, int] | None = None,
) -> int:
    """Rows of k (and as many of v) that a `DecodingCache` holds per sequence.

    Per branch ⌈(w − o)/r⌉ for each offset o among the heads of q that share a head of k and v: with
    H = H_kv about H · Σ w/r, whatever the length of the context. A cache of every key has S · H_kv.

    Args:
        pattern: The branches.
        num_heads: H.
        num_kv_heads: H_kv, which divides H; H if None.
        max_seq_len: Most tokens that the cache will see, if known; a longer segment counts as one
            of this length. None: any number.
        head_range: `(first, total)` if the cache is for heads first to first + H − 1 of `total`.

    Raises:
        TypeError, ValueError: As `DecodingCache`.

    Example:
        >>> decoding_cache_rows(DilatedPattern([2048, 8192], [1, 4]), num_heads=8)
        32768
    """
    sizes = check_sizes(pattern, num_heads, num_kv_heads, max_seq_len, head_range)
    return plan_sections(pattern, *sizes)[1]


def decoding_cache_nbytes(
    pattern: DilatedPattern,
    *,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    dtype: torch.dtype,
    max_seq_len: int | None = None,
    head_range: tuple[int, int] | None = None,
) -> int:
    """Bytes of the k and v that a `DecodingCache` with these arguments holds.

    Raises:
        TypeError, ValueError: As `DecodingCache`.

    Example:
        >>> pattern = DilatedPattern([2048, 8192], [1, 4])
        >>> decoding_cache_nbytes(
        ...     pattern, batch_size=1, num_heads=8, head_dim=64, dtype=torch.bfloat16
        ... )
        8388608
    """
    batch_size = check_integer("batch_size", batch_size, at_least=0)
    head_dim = check_integer("head_dim", head_dim, at_least=1)
    check_float_dtype(dtype)
    rows = decoding_cache_rows(
        pattern,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_seq_len=max_seq_len,
        head_range=head_range,
    )
    return 2 * batch_size * rows * head_dim * dtype.itemsize


def check_sizes(
    pattern: DilatedPattern,
    num_heads: int,
    num_kv_heads: int | None,
    max_seq_len: int | None,
    head_range: tuple[int, int] | None,
) -> tuple[int, int, int | None, tuple[int, int]]:
    """Check what the plan depends on; returns H, H_kv, `max_seq_len` and `(first, total)`.

    Raises:
        TypeError: If `pattern` is no DilatedPattern, a size no integer, or `head_range` no pair.
        ValueError: If a size is below 1, H_kv does not divide H, or the heads are not among those
            of `head_range`.
    """
    check_pattern(pattern)
    if max_seq_len is not None:
        max_seq_len = check_integer("max_seq_len", max_seq_len, at_least=1)
    num_heads = check_integer("num_heads", num_heads, at_least=1)
    num_kv_heads = check_head_groups(num_heads, num_kv_heads)
    return num_heads, num_kv_heads, max_seq_len, check_head_range(head_range, num_heads)
