"""What a decoding cache keeps of each branch, and how much that is: arithmetic on integers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from dilated_core.pattern import DilatedPattern, head_offset, kept_rows


class Block(NamedTuple):
    """Rows of the cache that belong to one branch and one offset of heads.

    Attributes:
        offset: Of its heads, in a segment.
        first_row: Its first row in the cache.
        num_rows: Rows per head of k and v.
        kv_heads: The heads of k and v that it stores.
        q_heads: For each of them, the heads of q that read it: equally many.
    """

    offset: int
    first_row: int
    num_rows: int
    kv_heads: list[int]
    q_heads: list[list[int]]


def plan_blocks(
    pattern: DilatedPattern, num_heads: int, num_kv_heads: int, max_seq_len: int | None
) -> tuple[list[list[Block]], int]:
    """The blocks of each branch, one behind the other, and the number of their rows."""
    blocks: list[list[Block]] = []
    first_row = 0
    for w, r in pattern.branches:
        w = w if max_seq_len is None else min(w, max_seq_len)
        readers: dict[tuple[int, int], list[int]] = {}
        for head in range(num_heads):
            offset = head_offset(head, r, num_heads, pattern.head_offsets)
            kv_head = head // (num_heads // num_kv_heads)
            readers.setdefault((offset, kv_head), []).append(head)
        # Where r does not divide H / H_kv, heads of k and v have one reader more or less; a block
        # holds those with equally many, so that its queries make a dense matrix.
        regular: dict[tuple[int, int], list[int]] = {}
        for (offset, kv_head), heads in readers.items():
            regular.setdefault((offset, len(heads)), []).append(kv_head)
        branch: list[Block] = []
        for (offset, _), kv_heads in regular.items():
            num_rows = kept_rows(w, r, offset)
            q_heads = [readers[offset, kv_head] for kv_head in kv_heads]
            branch.append(Block(offset, first_row, num_rows, kv_heads, q_heads))
            first_row += len(kv_heads) * num_rows
        blocks.append(branch)
    return blocks, first_row


def decoding_cache_rows(
    pattern: DilatedPattern,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    max_seq_len: int | None = None,
) -> int:
    """Rows of k (and as many of v) that a `DecodingCache` holds per sequence.

    Per branch ⌈(w − o)/r⌉ for each offset o among the heads of q that share a head of k and v: with
    H = H_kv about H · Σ w/r, whatever the length of the context. A cache of every key has S · H_kv.

    Args:
        pattern: The branches.
        num_heads: H.
        num_kv_heads: H_kv, which divides H; H if None.
        max_seq_len: Tokens that will be decoded at most; segments need not be longer. None: any
            number.

    Raises:
        TypeError, ValueError: As `DecodingCache`.

    Example:
        >>> decoding_cache_rows(DilatedPattern([2048, 8192], [1, 4]), num_heads=8)
        32768
    """
    num_kv_heads = check_sizes(pattern, num_heads, num_kv_heads, max_seq_len)
    return plan_blocks(pattern, num_heads, num_kv_heads, max_seq_len)[1]


def decoding_cache_nbytes(
    pattern: DilatedPattern,
    *,
    batch_size: int,
    num_heads: int,
    num_kv_heads: int | None = None,
    head_dim: int,
    dtype: torch.dtype,
    max_seq_len: int | None = None,
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
    check_integer("batch_size", batch_size, at_least=0)
    check_integer("head_dim", head_dim, at_least=1)
    check_float_dtype(dtype)
    rows = decoding_cache_rows(
        pattern, num_heads=num_heads, num_kv_heads=num_kv_heads, max_seq_len=max_seq_len
    )
    return 2 * batch_size * rows * head_dim * dtype.itemsize


def check_sizes(
    pattern: DilatedPattern, num_heads: int, num_kv_heads: int | None, max_seq_len: int | None
) -> int:
    """Check what the plan depends on; returns H_kv.

    Raises:
        TypeError: If `pattern` is no DilatedPattern or a size no integer.
        ValueError: If a size is below 1 or H_kv does not divide H.
    """
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}; it must be a DilatedPattern, such as "
            f"DilatedPattern([2048, 4096], [1, 2])."
        )
    check_integer("num_heads", num_heads, at_least=1)
    if max_seq_len is not None:
        check_integer("max_seq_len", max_seq_len, at_least=1)
    if num_kv_heads is None:
        return num_heads
    check_integer("num_kv_heads", num_kv_heads, at_least=1)
    if num_heads % num_kv_heads:
        raise ValueError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}; num_kv_heads must divide "
            f"num_heads, so that each head of k and v serves equally many of q."
        )
    return num_kv_heads


def check_integer(name: str, value: int, *, at_least: int) -> None:
    """Refuse what is no integer or too small, with TypeError and ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an integer.")
    if value < at_least:
        raise ValueError(f"{name} is {value}; it must be at least {at_least}.")


def check_float_dtype(dtype: torch.dtype) -> None:
    """Refuse what is no floating-point dtype, with TypeError."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}; it must be a floating-point dtype of torch.")
