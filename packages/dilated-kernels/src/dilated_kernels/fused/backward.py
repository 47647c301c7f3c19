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
    head_offset,
    heads_of_slot,
    kept_rows,
    load_rows,
    locate_program,
    locate_segment,
    row_pointers,
)
from dilated_kernels.fused.arithmetic import LOG2_E, dot, keep_factor


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def delta_kernel(
    dout, out, dlse, delta,
    dout_stride_b, dout_stride_s, dout_stride_h, num_rows, seq_len, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Row sums delta = rowsum(dout · out) − dlse, float32 `(B, S, H)`.

    A gradient of lse enters as ds = p · (dout·v − delta + dlse), hence the difference.

    Args:
        dout: By its strides, the last of which is 1.
        out: Contiguous `(B, S, H, D)`.
        dlse: Contiguous `(B, S, H)` or None.
        num_rows: B · S · H.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < num_rows
    head = row % num_heads
    position = row // num_heads % seq_len
    batch = row // num_heads // seq_len
    dims = tl.arange(0, BLOCK_D)
    base = batch * dout_stride_b + head * dout_stride_h
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    dout_tile = tl.load(
        dout + (base + position * dout_stride_s)[:, None] + dims[None, :], mask=mask, other=0.0
    )
    out_tile = tl.load(out + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    total = tl.sum(dout_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    if dlse is not None:
        total -= tl.load(dlse + row, mask=inside, other=0.0)
    tl.store(delta + row, total, mask=inside)


@triton.jit
def _sum_over_keys(
    dq, q, dout, lse_log2, delta, k, v, key_mask, k_row_stride, v_row_stride, mask_row_stride,
    first_key, stop_key, num_rows, row, dims,
    first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds·k over the keys from `first_key` to `stop_key`; MASKED as in the forward kernel."""
    lane = tl.arange(0, BLOCK_N)
    for start in range(first_key, stop_key, BLOCK_N):
        key = start + lane
        inside = key < num_rows
        k_tile = load_rows(k, key, k_row_stride, inside, dims, HEAD_DIM, MASKED)
        v_tile = load_rows(v, key, v_row_stride, inside, dims, HEAD_DIM, MASKED)
        scores = dot(q, tl.trans(k_tile), PRECISION) * scale_log2
        probability = tl.exp2(scores - lse_log2[:, None])
        dp = dot(dout, tl.trans(v_tile), PRECISION)
        if HAS_DROPOUT:
            dp *= keep_factor(
                seed, branch, sequence, first_position, rate, row[:, None], key[None, :], dropout_p
            )
        ds = probability * (dp - delta[:, None])
        if MASKED:
            if IS_CAUSAL:
                seen = (key[None, :] <= row[:, None]) & inside[None, :]
            else:
                seen = inside[None, :]
            ds = tl.where(seen, ds, 0.0)
        if key_mask is not None:
            hidden = tl.load(key_mask + key.to(tl.int64) * mask_row_stride, mask=inside, other=1)
            ds = tl.where(hidden[None, :] != 0, 0.0, ds)
        dq += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
    return dq


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    q, k, v, key_mask, segments, order, dout, lse, delta, partial, dq,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s, mask_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    seq_len, num_heads, group, segment_length, rate, heads_per_offset, cells, tiles,
    scale, dropout_p, seed, branch,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BLOCKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient dq of one tile of queries from the keys of one branch.

    Args: As for `forward_kernel`, and
        dout: By its strides.
        lse, delta: float32 `(B, S, H)`, contiguous.
        partial: float32 `(B, S, H, D)`, contiguous: the sum over earlier branches, 0 where there
            was none; or None.
        dq: Contiguous `(B, S, H, D)` of any dtype; may be `partial`.
    """
    cell, outer = locate_program(order, cells)
    segment = cell // tiles
    tile = cell % tiles
    if IS_CAUSAL:
        tile = tiles - 1 - tile
    head = outer % num_heads
    batch = (outer // num_heads).to(tl.int64)
    start, length, _ = locate_segment(segment, segments, seq_len, segment_length)
    offset = head_offset(head, rate, heads_per_offset, BLOCKED)
    num_rows = kept_rows(length, rate, offset).to(tl.int32)
    first_row = tile * BLOCK_M
    if first_row >= num_rows:
        return
    first_position = start + offset
    row = first_row + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    inside = row < num_rows

    wide_head = head.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    q += batch * q_stride_b + wide_head * q_stride_h + first_position * q_stride_s
    dout += batch * dout_stride_b + wide_head * dout_stride_h + first_position * dout_stride_s
    k += batch * k_stride_b + kv_head * k_stride_h + first_position * k_stride_s
    v += batch * v_stride_b + kv_head * v_stride_h + first_position * v_stride_s
    if key_mask is not None:
        key_mask += batch * mask_stride_b + kv_head * mask_stride_h + first_position * mask_stride_s
    row_stride = tl.cast(rate, tl.int64)
    q_tile = load_rows(q, row, row_stride * q_stride_s, inside, dims, HEAD_DIM, True)
    dout_tile = load_rows(dout, row, row_stride * dout_stride_s, inside, dims, HEAD_DIM, True)

    first_result = (batch * seq_len + first_position) * num_heads + head
    result_stride = row_stride * num_heads
    in_lse = first_result + row.to(tl.int64) * result_stride
    row_lse = tl.load(lse + in_lse, mask=inside, other=float("inf"))
    # A row without keys has lse −∞ and probabilities 0, as one with lse +∞.
    lse_log2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    row_delta = tl.load(delta + in_lse, mask=inside, other=0.0)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    sequence = (outer % 2147483647).to(tl.int32)
    if IS_CAUSAL:
        stop_key = tl.minimum(first_row + BLOCK_M, num_rows)
        unmasked = first_row // BLOCK_N * BLOCK_N
    else:
        stop_key = num_rows
        unmasked = num_rows // BLOCK_N * BLOCK_N
    total = _sum_over_keys(
        total, q_tile, dout_tile, lse_log2, row_delta, k, v, key_mask,
        row_stride * k_stride_s, row_stride * v_stride_s, row_stride * mask_stride_s,
        0, unmasked, num_rows, row, dims,
        first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
        HEAD_DIM, BLOCK_N, False, IS_CAUSAL, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    total = _sum_over_keys(
        total, q_tile, dout_tile, lse_log2, row_delta, k, v, key_mask,
        row_stride * k_stride_s, row_stride * v_stride_s, row_stride * mask_stride_s,
        unmasked, stop_key, num_rows, row, dims,
        first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
        HEAD_DIM, BLOCK_N, True, IS_CAUSAL, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    total *= scale
    result_stride *= HEAD_DIM
    if partial is not None:
        partial += first_result * HEAD_DIM
        total += load_rows(partial, row, result_stride, inside, dims, HEAD_DIM, True)
    pointers = row_pointers(dq + first_result * HEAD_DIM, row, result_stride, dims)
    tile_mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, total.to(dq.dtype.element_ty), mask=tile_mask)


@triton.jit
def _add_queries(
    dk, dv, k, v, hidden, q, dout, lse, delta, q_row_stride, dout_row_stride, lse_row_stride,
    query, num_rows, row, dims,
    first_position, rate, scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dsᵀ·q and pᵀ·dout of one tile of queries. Tiles are keys × queries."""
    inside = query < num_rows
    q_tile = load_rows(q, query, q_row_stride, inside, dims, HEAD_DIM, True)
    dout_tile = load_rows(dout, query, dout_row_stride, inside, dims, HEAD_DIM, True)
    in_lse = query.to(tl.int64) * lse_row_stride
    # Rows beyond the segment get lse +∞, hence probability 0.
    row_lse = tl.load(lse + in_lse, mask=inside, other=float("inf"))
    row_delta = tl.load(delta + in_lse, mask=inside, other=0.0)
    lse_log2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    scores = dot(k, tl.trans(q_tile), PRECISION) * scale_log2
    probability = tl.exp2(scores - lse_log2[None, :])
    if IS_CAUSAL:
        probability = tl.where(query[None, :] >= row[:, None], probability, 0.0)
    if HAS_MASK:
        probability = tl.where(hidden[:, None] != 0, 0.0, probability)
    dp = dot(v, tl.trans(dout_tile), PRECISION)
    if HAS_DROPOUT:
        keep = keep_factor(
            seed, branch, sequence, first_position, rate, query[None, :], row[:, None], dropout_p
        )
        dp *= keep
        dv += dot((probability * keep).to(dout_tile.dtype), dout_tile, PRECISION)
    else:
        dv += dot(probability.to(dout_tile.dtype), dout_tile, PRECISION)
    ds = probability * (dp - row_delta[None, :])
    dk += dot(ds.to(q_tile.dtype), q_tile, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dk_dv_kernel(
    q, k, v, key_mask, segments, order, dout, lse, delta, dk_partial, dv_partial, dk, dv,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s, mask_stride_h,
    dout_stride_b, dout_stride_s, dout_stride_h,
    seq_len, num_heads, group, segment_length, rate, heads_per_offset, cells, tiles, slots,
    scale, dropout_p, seed, branch,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr, BLOCKED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of one tile of keys from the queries of one branch.

    A program serves one slot (see `heads_of_slot`) of one head of k and v: all heads of q that read
    these rows.

    Args: As for `dq_kernel`, and
        dk_partial, dv_partial: float32 `(B, S, H_kv, D)`, contiguous, or None.
        dk, dv: Contiguous `(B, S, H_kv, D)`.
        slots: Slots per head of k and v.
    """
    cell, outer = locate_program(order, cells)
    segment = cell // tiles
    tile = cell % tiles
    slot = outer % slots
    num_kv_heads = num_heads // group
    kv_head = outer // slots % num_kv_heads
    batch = (outer // slots // num_kv_heads).to(tl.int64)
    first_head, head_step, num_heads_here = heads_of_slot(
        kv_head, slot, rate, group, heads_per_offset, BLOCKED
    )
    if num_heads_here == 0:
        return
    start, length, _ = locate_segment(segment, segments, seq_len, segment_length)
    offset = head_offset(first_head, rate, heads_per_offset, BLOCKED)
    num_rows = kept_rows(length, rate, offset).to(tl.int32)
    first_row = tile * BLOCK_N
    if first_row >= num_rows:
        return
    first_position = start + offset
    row = first_row + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    inside = row < num_rows

    wide_kv_head = kv_head.to(tl.int64)
    k += batch * k_stride_b + wide_kv_head * k_stride_h + first_position * k_stride_s
    v += batch * v_stride_b + wide_kv_head * v_stride_h + first_position * v_stride_s
    row_stride = tl.cast(rate, tl.int64)
    k_tile = load_rows(k, row, row_stride * k_stride_s, inside, dims, HEAD_DIM, True)
    v_tile = load_rows(v, row, row_stride * v_stride_s, inside, dims, HEAD_DIM, True)
    hidden = row
    if key_mask is not None:
        key_mask += batch * mask_stride_b + wide_kv_head * mask_stride_h
        key_mask += first_position * mask_stride_s
        in_mask = row.to(tl.int64) * row_stride * mask_stride_s
        hidden = tl.load(key_mask + in_mask, mask=inside, other=1)

    dk_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    # Queries before the tile see none of its keys if causal.
    first_query = first_row // BLOCK_M * BLOCK_M if IS_CAUSAL else 0
    q += batch * q_stride_b + first_position * q_stride_s
    dout += batch * dout_stride_b + first_position * dout_stride_s
    first_lse = (batch * seq_len + first_position) * num_heads
    # One loop over the heads and their tiles, with masks throughout: nested or split loops keep so
    # many addresses in registers that they spill.
    lane = tl.arange(0, BLOCK_M)
    steps = (num_rows - first_query + BLOCK_M - 1) // BLOCK_M
    for step in range(num_heads_here * steps):
        head = (first_head + step // steps * head_step).to(tl.int64)
        query = first_query + step % steps * BLOCK_M + lane
        dk_total, dv_total = _add_queries(
            dk_total, dv_total, k_tile, v_tile, hidden,
            q + head * q_stride_h, dout + head * dout_stride_h,
            lse + first_lse + head, delta + first_lse + head,
            row_stride * q_stride_s, row_stride * dout_stride_s, row_stride * num_heads,
            query, num_rows, row, dims,
            first_position, rate, scale_log2, dropout_p, seed, branch,
            ((batch * num_heads + head) % 2147483647).to(tl.int32),
            HEAD_DIM, IS_CAUSAL, key_mask is not None, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    dk_total *= scale

    first_result = ((batch * seq_len + first_position) * num_kv_heads + kv_head) * HEAD_DIM
    result_stride = row_stride * num_kv_heads * HEAD_DIM
    if dk_partial is not None:
        dk_partial += first_result
        dv_partial += first_result
        dk_total += load_rows(dk_partial, row, result_stride, inside, dims, HEAD_DIM, True)
        dv_total += load_rows(dv_partial, row, result_stride, inside, dims, HEAD_DIM, True)
    tile_mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    dk_pointers = row_pointers(dk + first_result, row, result_stride, dims)
    dv_pointers = row_pointers(dv + first_result, row, result_stride, dims)
    tl.store(dk_pointers, dk_total.to(dk.dtype.element_ty), mask=tile_mask)
    tl.store(dv_pointers, dv_total.to(dv.dtype.element_ty), mask=tile_mask)
