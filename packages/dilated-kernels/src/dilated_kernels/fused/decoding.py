"""One decoding step: how the keys are split, and the one or two launches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
from dilated_core import AttentionOutput
from dilated_core.backends.cache_layout import CacheLayout

from dilated_kernels.fused import decode
from dilated_kernels.fused.launch import Launch, dot_precision, run

# A program reads about 64 KiB of half-precision keys and values: enough to outweigh its partial
# result of D float32, few enough for one sequence of 12 heads to fill a GPU.
ELEMENTS_PER_SPLIT = 2**14
# The most splits that `merge_kernel` takes; with more keys, splits become longer.
MAX_SPLITS = 128


class Blocks(NamedTuple):
    """Sizes of the tiles of `decode_kernel`, named like its constants.

    Attributes:
        BLOCK_H: Heads of q per program: 1, or the 16 rows that a matrix product has at least.
        BLOCK_N: Keys per tile.
        BLOCK_D: head_dim, rounded up.
        BLOCK_R: Branches, rounded up.
        num_warps: Warps per program.
    """

    BLOCK_H: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_R: int
    num_warps: int


def choose_blocks(group: int, head_dim: int, num_branches: int, dtype: torch.dtype) -> Blocks:
    """Tiles for `group` = H / H_kv heads of q per head of k and v, so that no register spills."""
    block_r = triton.next_power_of_2(num_branches)
    if group == 1:
        block_d = triton.next_power_of_2(head_dim)
        return Blocks(1, _clamp(2**12 // block_d, 64), block_d, block_r, num_warps=4)
    block_d = max(16, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        # These products run without tensor cores and need many registers.
        return Blocks(16, _clamp(2**11 // block_d, 32), block_d, block_r, num_warps=8)
    return Blocks(16, _clamp(2**12 // block_d, 64), block_d, block_r, num_warps=4)


def _clamp(keys: int, most: int) -> int:
    return min(most, max(16, keys))


class Splits(NamedTuple):
    """The keys of a step cut into `parts` of `keys_per_split`."""

    parts: int
    keys_per_split: int


def choose_splits(
    layout: CacheLayout, position: int, head_dim: int, elements_per_split: int = ELEMENTS_PER_SPLIT
) -> Splits:
    """Splits by position and pattern alone, so the batch makes no difference to results.

    Counts as many keys as a head sees if every branch keeps the position, which is the most.
    """
    num_keys = sum(position % w // r for w, r in layout.branches)
    at_least = elements_per_split // triton.next_power_of_2(head_dim)
    keys_per_split = max(at_least, -(-num_keys // MAX_SPLITS))
    return Splits(max(1, -(-num_keys // keys_per_split)), keys_per_split)


def decode_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: CacheLayout,
    *,
    position: int,
    scale: float,
    elements_per_split: int = ELEMENTS_PER_SPLIT,
) -> AttentionOutput:
    """See `dilated_core.AttentionBackend`: append the token at `position`, and attend from it.

    Args:
        q: `(B, 1, H, D)`.
        k, v: `(B, 1, H_kv, D)`.
        keys, values: `(B, rows, D)`, contiguous; they are written to.
        layout: Where each head's rows are.
        position: Of the token, counted from 0.
        scale: Factor of the scores.
        elements_per_split: Elements of keys that one program reads, at least.

    Returns:
        `out` `(B, 1, H, D)` in the dtype of q and `lse` `(B, 1, H)`, float32.
    """
    B, _, H, D = q.shape
    out, lse = q.new_empty(B, 1, H, D), q.new_empty(B, 1, H, dtype=torch.float32)
    if B:
        launches = decode_launches(
            q, k, v, keys, values, layout, out, lse,
            position=position, scale=scale, precision=dot_precision(q.dtype),
            elements_per_split=elements_per_split,
        )  # fmt: skip
        run(launches, q.device)
    return AttentionOutput(out, lse)


def decode_launches(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: CacheLayout,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    position: int,
    scale: float,
    precision: str,
    elements_per_split: int = ELEMENTS_PER_SPLIT,
) -> Iterator[Launch]:
    """The launch of `decode_kernel`, and that of `merge_kernel` where the keys are split.

    Args:
        q, k, v, keys, values, layout, position, scale: As for `decode_forward`.
        out: `(B, 1, H, D)`, contiguous; written.
        lse: float32 `(B, 1, H)`, contiguous; written.
        precision: Of float32 products: see `dilated_kernels.fused.arithmetic.dot`.
        elements_per_split: As for `decode_forward`.
    """
    B, _, H, D = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    H_kv = k.shape[2]
    blocks = choose_blocks(H // H_kv, D, len(layout.branches), q.dtype)
    splits = choose_splits(layout, position, D, elements_per_split)
    partial = partial_stats = None
    if splits.parts > 1:
        partial = q.new_empty(B, H, splits.parts, D, dtype=torch.float32)
        partial_stats = q.new_empty(B, H, splits.parts, 2, dtype=torch.float32)
    tiles = -(-(H // H_kv) // blocks.BLOCK_H)
    yield Launch(
        decode.decode_kernel,
        (B * H_kv * tiles * splits.parts,),
        (
            *(q, k, v, keys, values, layout.branch_table, layout.offsets, layout.first_rows),
            *(out, lse, partial, partial_stats),
            *(q.stride(0), q.stride(2), k.stride(0), k.stride(2), v.stride(0), v.stride(2)),
            *(keys.shape[1], H, H_kv, len(layout.branches)),
            *(position, *splits, scale),
        ),
        {
            "HEAD_DIM": D,
            **blocks._asdict(),
            "PRECISION": precision,
            "WIDE": position >= 2**31 - 1,
            "enable_fp_fusion": True,
        },
    )
    if partial is not None:
        yield Launch(
            decode.merge_kernel,
            (B * H,),
            (partial, partial_stats, out, lse, splits.parts),
            {
                "HEAD_DIM": D,
                "BLOCK_S": 16,
                "BLOCK_D": blocks.BLOCK_D,
                "MAX_SPLITS": MAX_SPLITS,
                "num_warps": 4,
                "enable_fp_fusion": True,
            },
        )
