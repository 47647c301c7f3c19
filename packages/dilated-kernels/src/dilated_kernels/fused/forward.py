"""Forward kernel: one branch over all heads, segments and documents, in one launch.

B batch, S sequence, H heads, D head_dim; M rows of a head in a segment; tiles of BLOCK_M queries
and BLOCK_N keys.

The online softmax of a tile starts from the result of the earlier branches, `partial` and `lse`: a
normalised result is a running state with maximum lse and sum 1. So the branches need no merge, and
after the last one the result is the softmax over the keys of all branches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_kernels.fused.addressing import (
    NOT_SPECIALIZED,
    load_rows,
    locate_program,
    locate_rows,
    row_offsets,
    row_pointers,
    row_zero,
)
from dilated_kernels.fused.arithmetic import LN_2, LOG2_E, dot, keep_factor


@triton.jit
def _attend_keys(
    acc, row_max, row_sum, q, k, v, key_mask, k_row_stride, v_row_stride, mask_row_stride,
    first_key, stop_key, num_rows, first_row, row_lane, dims,
    first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Fold the keys from `first_key` to `stop_key` into the running softmax.

    MASKED: some of them lie beyond the segment or, causal, beyond some query.
    """
    lane = tl.arange(0, BLOCK_N)
    for start in range(first_key, stop_key, BLOCK_N):
        key = start + lane
        inside = key < num_rows
        k_tile = load_rows(k, start, lane, k_row_stride, inside, dims, HEAD_DIM, MASKED, WIDE)
        v_tile = load_rows(v, start, lane, v_row_stride, inside, dims, HEAD_DIM, MASKED, WIDE)
        scores = dot(q, tl.trans(k_tile), PRECISION)
        if POSITIVE_SCALE:
            # Take the maximum of the unscaled scores, and scale them in the multiply-add below:
            # that saves one multiplication per score.
            factor = scale_log2
        else:
            scores *= scale_log2
            factor = 1.0
        if MASKED:
            if IS_CAUSAL:
                # Rows beyond the segment are not masked, because their results are not stored.
                seen = lane[None, :] <= (row_lane + (first_row - start))[:, None]
            else:
                seen = inside[None, :]
            scores = tl.where(seen, scores, float("-inf"))
        if key_mask is not None:
            mask_pointers = key_mask + tl.cast(start, tl.int64) * mask_row_stride
            mask_pointers += row_offsets(lane, mask_row_stride, WIDE)
            hidden = tl.load(mask_pointers, mask=inside, other=1)
            scores = tl.where(hidden[None, :] != 0, float("-inf"), scores)
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
        # Without the zero, a row that has seen no key yet would compute −inf − (−inf).
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probability = tl.exp2(scores * factor - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(probability, 1)
        if HAS_DROPOUT:
            probability *= keep_factor(
                seed, branch, sequence, first_position, rate,
                (first_row + row_lane)[:, None], key[None, :], dropout_p,
            )  # fmt: skip
        acc = acc * correction[:, None] + dot(probability.to(v_tile.dtype), v_tile, PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q, k, v, key_mask, segments, order, partial, out, lse,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s, mask_stride_h,
    seq_len, num_heads, group, segment_length, rate, heads_per_offset, cells, tiles,
    scale, dropout_p, seed, branch,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BLOCKED: tl.constexpr, ATTENDED: tl.constexpr,
    POSITIVE_SCALE: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of the queries of one tile over the keys of one branch.

    Args:
        q, k, v: `(B, S, H, D)` and `(B, S, H_kv, D)` by their strides, the last of which is 1.
        key_mask: uint8, not 0 where a key is hidden; or None.
        segments: See `locate_rows`; order: see `locate_program`.
        partial: float32 `(B, S, H, D)`, contiguous: out of earlier branches; None in the first.
        out: Contiguous `(B, S, H, D)` of any dtype; may be `partial`.
        lse: float32 `(B, S, H)`, contiguous; read if there is `partial`, and written.
        group: H / H_kv.
        cells, tiles: Programs per head and batch row; tiles per segment.
        POSITIVE_SCALE: Whether scale > 0.
        WIDE: See `row_offsets`.
    """
    segment, tile, outer = locate_program(order, cells, tiles, IS_CAUSAL)
    head = outer % num_heads
    batch = (outer // num_heads).to(tl.int64)
    first_position, num_rows, whole_rows = locate_rows(
        segment, segments, head, seq_len, segment_length, rate, heads_per_offset, BLOCKED
    )
    first_row = tile * BLOCK_M
    if first_row >= num_rows:
        return
    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane
    dims = tl.arange(0, BLOCK_D)
    inside = row < num_rows

    kv_head = head // group
    q = row_zero(q, batch, head, first_position, q_stride_b, q_stride_s, q_stride_h)
    k = row_zero(k, batch, kv_head, first_position, k_stride_b, k_stride_s, k_stride_h)
    v = row_zero(v, batch, kv_head, first_position, v_stride_b, v_stride_s, v_stride_h)
    if key_mask is not None:
        key_mask = row_zero(
            key_mask, batch, kv_head, first_position, mask_stride_b, mask_stride_s, mask_stride_h
        )
    row_stride = tl.cast(rate, tl.int64)
    q_tile = load_rows(
        q, first_row, lane, row_stride * q_stride_s, inside, dims, HEAD_DIM, True, WIDE
    )

    first_result = (batch * seq_len + first_position) * num_heads + head
    result_stride = row_stride * num_heads
    lse_pointers = lse + first_result + tl.cast(first_row, tl.int64) * result_stride
    lse_pointers += row_offsets(lane, result_stride, WIDE)
    result_stride_d = result_stride * HEAD_DIM
    if partial is not None:
        earlier = tl.load(lse_pointers, mask=inside, other=float("-inf"))
        # Rows that no earlier branch has written are uninitialised memory.
        touched = earlier != float("-inf")
        row_max = earlier * LOG2_E
        row_sum = tl.where(touched, 1.0, 0.0)
        partial += first_result * HEAD_DIM
        acc = load_rows(
            partial, first_row, lane, result_stride_d, touched, dims, HEAD_DIM, True, WIDE
        )
    else:
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    scale_log2 = scale * LOG2_E
    if IS_CAUSAL:
        stop_key = tl.minimum(first_row + BLOCK_M, num_rows)
        unmasked = first_row // BLOCK_N * BLOCK_N
    else:
        stop_key = num_rows
        unmasked = num_rows // BLOCK_N * BLOCK_N
    # The conditions: around a loop that may run zero times, the compiler for Hopper loses track of
    # the accumulators and waits for each product (ptxas C7515).
    if unmasked > 0:
        acc, row_max, row_sum = _attend_keys(
            acc, row_max, row_sum, q_tile, k, v, key_mask,
            row_stride * k_stride_s, row_stride * v_stride_s, row_stride * mask_stride_s,
            0, unmasked, num_rows, first_row, lane, dims,
            first_position, rate, scale_log2, dropout_p, seed, branch, outer,
            HEAD_DIM, BLOCK_N, False, IS_CAUSAL, POSITIVE_SCALE, HAS_DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
    if stop_key > unmasked:
        acc, row_max, row_sum = _attend_keys(
            acc, row_max, row_sum, q_tile, k, v, key_mask,
            row_stride * k_stride_s, row_stride * v_stride_s, row_stride * mask_stride_s,
            unmasked, stop_key, num_rows, first_row, lane, dims,
            first_position, rate, scale_log2, dropout_p, seed, branch, outer,
            HEAD_DIM, BLOCK_N, True, IS_CAUSAL, POSITIVE_SCALE, HAS_DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
    if ATTENDED and not IS_CAUSAL:
        # Zero keys: their score is 0, their value 0.
        zero_keys = (whole_rows - num_rows).to(tl.float32)
        new_max = tl.where(zero_keys > 0, tl.maximum(row_max, 0.0), row_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        correction = tl.exp2(row_max - shift)
        # With zero keys the shift is at least 0. Without them it may be so low that exp2 of its
        # negative is infinite, and 0 · infinity is NaN; hence the maximum.
        row_sum = row_sum * correction + zero_keys * tl.exp2(-tl.maximum(shift, 0.0))
        acc = acc * correction[:, None]
        row_max = new_max

    is_empty = row_sum == 0.0
    total = tl.where(is_empty, 1.0, row_sum)
    acc *= (1.0 / total)[:, None]
    row_lse = tl.where(is_empty, float("-inf"), (row_max + tl.log2(total)) * LN_2)
    out += first_result * HEAD_DIM
    pointers = row_pointers(out, first_row, lane, result_stride_d, dims, WIDE)
    tile_mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=tile_mask)
    tl.store(lse_pointers, row_lse, mask=inside)
