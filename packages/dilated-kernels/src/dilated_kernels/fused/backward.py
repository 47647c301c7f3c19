"""Backward kernels: gradients of one branch over all heads and segments, given the merged lse.

With the lse and out that were merged over all branches, p = exp(scale · q·k − lse) is the
probability in the one softmax over all branches' keys and delta = rowsum(dout · out) its global
mean, so the gradients of the branches add up (docs/math.md). `dq_kernel` walks over the keys of a
tile of queries, `dk_dv_kernel` over the queries of a tile of keys; every row of a result belongs to
one program of a launch, so there are no atomics, and the same inputs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_kernels.fused.addressing import (
    NOT_SPECIALIZED,
    heads_of_slot,
    load_rows,
    locate_program,
    locate_rows,
    row_offsets,
    row_pointers,
    row_zero,
)
from dilated_kernels.fused.arithmetic import LOG2_E, dot, keep_factor


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def delta_kernel(
    dout, out, dlse, lse, row_values,
    dout_stride_b, dout_stride_s, dout_stride_h, seq_len, num_heads, blocks,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute two values of each row: lse in base 2, and delta = rowsum(dout · out) − dlse.

    A gradient of lse enters as ds = p · (dout·v − delta + dlse), hence the difference. A row
    without keys has lse −∞ and gets +∞, so its probabilities are 0 without a test in the loops.

    The rows of BLOCK_M positions, of all heads, are the tiles of `num_heads` programs.

    Args:
        dout: By its strides, the last of which is 1.
        out: Contiguous `(B, S, H, D)`.
        dlse: Contiguous `(B, S, H)` or None.
        lse: Contiguous `(B, S, H)`.
        row_values: float32 `(B, S, H, 2)`, contiguous; written. The other kernels read both values
            of a row together, and rows are far apart, so the two are neighbours in memory.
        blocks: ⌈S / BLOCK_M⌉.
    """
    program = tl.program_id(0)
    block = program // num_heads % blocks
    batch = (program // num_heads // blocks).to(tl.int64)
    place = program % num_heads * BLOCK_M + tl.arange(0, BLOCK_M)
    head = place % num_heads
    position = block.to(tl.int64) * BLOCK_M + place // num_heads
    inside = position < seq_len
    row = (batch * seq_len + position) * num_heads + head
    dims = tl.arange(0, BLOCK_D)
    in_dout = batch * dout_stride_b + position * dout_stride_s + head.to(tl.int64) * dout_stride_h
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    dout_tile = tl.load(dout + in_dout[:, None] + dims[None, :], mask=mask, other=0.0)
    out_tile = tl.load(out + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    delta = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        delta -= tl.load(dlse + row, mask=inside, other=0.0)
    row_lse = tl.load(lse + row, mask=inside, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    tl.store(row_values + 2 * row, row_lse, mask=inside)
    tl.store(row_values + 2 * row + 1, delta, mask=inside)


@triton.jit
def _sum_over_keys(
    dq, q, dout, lse_log2, delta, k, v, key_mask, k_row_stride, v_row_stride, mask_row_stride,
    first_key, stop_key, num_rows, first_row, row_lane, dims,
    first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add ds·k over the keys from `first_key` to `stop_key`; MASKED as in the forward kernel."""
    lane = tl.arange(0, BLOCK_N)
    for start in range(first_key, stop_key, BLOCK_N):
        key = start + lane
        inside = key < num_rows
        k_tile = load_rows(k, start, lane, k_row_stride, inside, dims, HEAD_DIM, MASKED, WIDE)
        v_tile = load_rows(v, start, lane, v_row_stride, inside, dims, HEAD_DIM, MASKED, WIDE)
        scores = dot(q, tl.trans(k_tile), PRECISION) * scale_log2
        probability = tl.exp2(scores - lse_log2[:, None])
        dp = dot(dout, tl.trans(v_tile), PRECISION)
        if HAS_DROPOUT:
            dp *= keep_factor(
                seed, branch, sequence, first_position, rate,
                (first_row + row_lane)[:, None], key[None, :], dropout_p,
            )  # fmt: skip
        ds = probability * (dp - delta[:, None])
        if MASKED:
            if IS_CAUSAL:
                # Rows beyond the segment are not masked, because their results are not stored.
                seen = lane[None, :] <= (row_lane + (first_row - start))[:, None]
            else:
                seen = inside[None, :]
            ds = tl.where(seen, ds, 0.0)
        if key_mask is not None:
            mask_pointers = key_mask + tl.cast(start, tl.int64) * mask_row_stride
            mask_pointers += row_offsets(lane, mask_row_stride, WIDE)
            hidden = tl.load(mask_pointers, mask=inside, other=1)
            ds = tl.where(hidden[None, :] != 0, 0.0, ds)
        dq += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
    return dq


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    q, k, v, key_mask, segments, order, dout, row_values, partial, dq,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s, mask_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    seq_len, num_heads, group, segment_length, rate, heads_per_offset, cells, tiles,
    scale, dropout_p, seed, branch,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BLOCKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient dq of one tile of queries from the keys of one branch.

    Args: As for `forward_kernel`, and
        dout: By its strides.
        row_values: float32 `(B, S, H, 2)`, contiguous: the result of `delta_kernel`.
        partial: float32 `(B, S, H, D)`, contiguous: the sum over earlier branches, 0 where there
            was none; or None.
        dq: Contiguous `(B, S, H, D)` of any dtype; may be `partial`.
    """
    segment, tile, outer = locate_program(order, cells, tiles, IS_CAUSAL)
    head = outer % num_heads
    batch = (outer // num_heads).to(tl.int64)
    first_position, num_rows, _ = locate_rows(
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
    dout = row_zero(dout, batch, head, first_position, dout_stride_b, dout_stride_s, dout_stride_h)
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
    dout_tile = load_rows(
        dout, first_row, lane, row_stride * dout_stride_s, inside, dims, HEAD_DIM, True, WIDE
    )

    first_result = (batch * seq_len + first_position) * num_heads + head
    result_stride = row_stride * num_heads
    row_values += 2 * (first_result + tl.cast(first_row, tl.int64) * result_stride)
    in_rows = row_offsets(lane, 2 * result_stride, WIDE)
    row_lse = tl.load(row_values + in_rows, mask=inside, other=float("inf"))
    row_delta = tl.load(row_values + 1 + in_rows, mask=inside, other=0.0)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        total = _sum_over_keys(
            total, q_tile, dout_tile, row_lse, row_delta, k, v, key_mask,
            row_stride * k_stride_s, row_stride * v_stride_s, row_stride * mask_stride_s,
            0, unmasked, num_rows, first_row, lane, dims,
            first_position, rate, scale_log2, dropout_p, seed, branch, outer,
            HEAD_DIM, BLOCK_N, False, IS_CAUSAL, HAS_DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
    if stop_key > unmasked:
        total = _sum_over_keys(
            total, q_tile, dout_tile, row_lse, row_delta, k, v, key_mask,
            row_stride * k_stride_s, row_stride * v_stride_s, row_stride * mask_stride_s,
            unmasked, stop_key, num_rows, first_row, lane, dims,
            first_position, rate, scale_log2, dropout_p, seed, branch, outer,
            HEAD_DIM, BLOCK_N, True, IS_CAUSAL, HAS_DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
    total *= scale
    _store_sum(
        dq, partial, total, first_result * HEAD_DIM, result_stride * HEAD_DIM,
        first_row, lane, inside, dims, HEAD_DIM, WIDE,
    )  # fmt: skip


@triton.jit
def _store_sum(
    result, partial, total, row_zero_offset, row_stride, first, lane, inside, dims,
    HEAD_DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Store `total` in rows of `result`, after adding the rows of `partial` unless it is None."""
    if partial is not None:
        total += load_rows(
            partial + row_zero_offset, first, lane, row_stride, inside, dims, HEAD_DIM, True, WIDE
        )
    pointers = row_pointers(result + row_zero_offset, first, lane, row_stride, dims, WIDE)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, total.to(result.dtype.element_ty), mask=mask)


@triton.jit
def _add_queries(
    dk, dv, k, v, hidden, q, dout, row_values, q_row_stride, dout_row_stride, value_row_stride,
    first_query, query_lane, num_rows, first_row, row_lane, dims,
    first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add dsᵀ·q and pᵀ·dout of one tile of queries. Tiles are keys × queries."""
    query = first_query + query_lane
    inside = query < num_rows
    q_tile = load_rows(q, first_query, query_lane, q_row_stride, inside, dims, HEAD_DIM, True, WIDE)
    dout_tile = load_rows(
        dout, first_query, query_lane, dout_row_stride, inside, dims, HEAD_DIM, True, WIDE
    )
    row_values += tl.cast(first_query, tl.int64) * value_row_stride
    in_rows = row_offsets(query_lane, value_row_stride, WIDE)
    # Rows beyond the segment are zero in q, dout and delta, so they add nothing, whatever p is.
    row_lse = tl.load(row_values + in_rows, mask=inside, other=0.0)
    row_delta = tl.load(row_values + 1 + in_rows, mask=inside, other=0.0)
    scores = dot(k, tl.trans(q_tile), PRECISION) * scale_log2
    probability = tl.exp2(scores - row_lse[None, :])
    if IS_CAUSAL:
        if first_query < first_row + row_lane.shape[0]:
            row = row_lane + (first_row - first_query)
            probability = tl.where(query_lane[None, :] >= row[:, None], probability, 0.0)
    if HAS_MASK:
        probability = tl.where(hidden[:, None] != 0, 0.0, probability)
    dp = dot(v, tl.trans(dout_tile), PRECISION)
    if HAS_DROPOUT:
        keep = keep_factor(
            seed, branch, sequence, first_position, rate,
            query[None, :], (first_row + row_lane)[:, None], dropout_p,
        )  # fmt: skip
        dp *= keep
        dv += dot((probability * keep).to(dout_tile.dtype), dout_tile, PRECISION)
    else:
        dv += dot(probability.to(dout_tile.dtype), dout_tile, PRECISION)
    ds = probability * (dp - row_delta[None, :])
    dk += dot(ds.to(q_tile.dtype), q_tile, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dk_dv_kernel(
    q, k, v, key_mask, segments, order, dout, row_values, dk_partial, dv_partial, dk, dv,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s, mask_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    seq_len, num_heads, group, segment_length, rate, heads_per_offset, cells, tiles, slots,
    scale, dropout_p, seed, branch,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BLOCKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of one tile of keys from the queries of one branch.

    A program serves one slot (see `heads_of_slot`) of one head of k and v: all heads of q that read
    these rows.

    Args: As for `dq_kernel`, and
        dk_partial, dv_partial: float32 `(B, S, H_kv, D)`, contiguous, or None.
        dk, dv: Contiguous `(B, S, H_kv, D)`.
        slots: Slots per head of k and v.
    """
    segment, tile, outer = locate_program(order, cells, tiles, False)
    slot = outer % slots
    num_kv_heads = num_heads // group
    kv_head = outer // slots % num_kv_heads
    batch = (outer // slots // num_kv_heads).to(tl.int64)
    first_head, head_step, num_heads_here = heads_of_slot(
        kv_head, slot, rate, group, heads_per_offset, BLOCKED
    )
    if num_heads_here == 0:
        return
    first_position, num_rows, _ = locate_rows(
        segment, segments, first_head, seq_len, segment_length, rate, heads_per_offset, BLOCKED
    )
    first_row = tile * BLOCK_N
    if first_row >= num_rows:
        return
    lane = tl.arange(0, BLOCK_N)
    row = first_row + lane
    dims = tl.arange(0, BLOCK_D)
    inside = row < num_rows

    k = row_zero(k, batch, kv_head, first_position, k_stride_b, k_stride_s, k_stride_h)
    v = row_zero(v, batch, kv_head, first_position, v_stride_b, v_stride_s, v_stride_h)
    row_stride = tl.cast(rate, tl.int64)
    k_tile = load_rows(
        k, first_row, lane, row_stride * k_stride_s, inside, dims, HEAD_DIM, True, WIDE
    )
    v_tile = load_rows(
        v, first_row, lane, row_stride * v_stride_s, inside, dims, HEAD_DIM, True, WIDE
    )
    hidden = row
    if key_mask is not None:
        key_mask = row_zero(
            key_mask, batch, kv_head, first_position, mask_stride_b, mask_stride_s, mask_stride_h
        )
        in_mask = row.to(tl.int64) * row_stride * mask_stride_s
        hidden = tl.load(key_mask + in_mask, mask=inside, other=1)

    dk_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    # With causality, queries before the tile see none of its keys.
    first_query = first_row // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    q += batch * q_stride_b + first_position * q_stride_s
    dout += batch * dout_stride_b + first_position * dout_stride_s
    row_values += 2 * (batch * seq_len + first_position) * num_heads
    # One loop over the heads and their tiles, with masks in each step: nested or split loops keep
    # so many addresses in registers that registers spill.
    query_lane = tl.arange(0, BLOCK_M)
    steps = num_heads_here * ((num_rows - first_query + BLOCK_M - 1) // BLOCK_M)
    head = first_head
    query = first_query
    tl.assume(steps > 0)  # else products wait for each other, as in `dq_kernel`
    for _ in range(steps):
        dk_total, dv_total = _add_queries(
            dk_total, dv_total, k_tile, v_tile, hidden,
            q + head.to(tl.int64) * q_stride_h, dout + head.to(tl.int64) * dout_stride_h,
            row_values + 2 * head,
            row_stride * q_stride_s, row_stride * dout_stride_s, 2 * row_stride * num_heads,
            query, query_lane, num_rows, first_row, lane, dims,
            first_position, rate, scale_log2, dropout_p, seed, branch,
            (batch * num_heads + head).to(tl.int32),
            HEAD_DIM, IS_CAUSAL, key_mask is not None, HAS_DROPOUT, PRECISION, WIDE,
        )  # fmt: skip
        query += BLOCK_M
        is_next = query >= num_rows
        query = tl.where(is_next, first_query, query)
        head = tl.where(is_next, head + head_step, head)
    first_result = ((batch * seq_len + first_position) * num_kv_heads + kv_head) * HEAD_DIM
    result_stride = row_stride * num_kv_heads * HEAD_DIM
    # One after the other: the rows of dk, dv and their partial sums do not fit the registers.
    _store_sum(
        dk, dk_partial, dk_total * scale, first_result, result_stride,
        first_row, lane, inside, dims, HEAD_DIM, WIDE,
    )  # fmt: skip
    _store_sum(
        dv, dv_partial, dv_total, first_result, result_stride,
        first_row, lane, inside, dims, HEAD_DIM, WIDE,
    )  # fmt: skip
