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
    head_offset,
    heads_of_slot,
    kept_rows,
    load_rows,
    locate_program,
    locate_segment,
)
from dilated_kernels.fused.arithmetic import LOG2_E, dot, keep_factor


@triton.jit
def delta_kernel(
    dout, out, dlse, delta,
    dout_stride_b, dout_stride_s, dout_stride_h, num_rows, seq_len, num_heads,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Delta = rowsum(dout · out) − dlse, float32 `(B, S, H)`.

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
    dq, q, dout, lse_log2, delta, k, v, key_mask,
    k_stride_s, v_stride_s, mask_stride_s,
    first_key, stop_key, num_rows, first_position, rate, row, dims,
    scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ds·k over the keys from `first_key` to `stop_key`; MASKED as in the forward kernel."""
    lane = tl.arange(0, BLOCK_N)
    for start in range(first_key, stop_key, BLOCK_N):
        key = start + lane
        position = first_position + key.to(tl.int64) * rate
        inside = key < num_rows
        k_tile = load_rows(k, position, k_stride_s, inside, dims, HEAD_DIM, MASKED)
        v_tile = load_rows(v, position, v_stride_s, inside, dims, HEAD_DIM, MASKED)
        scores = dot(q, tl.trans(k_tile), PRECISION) * scale_log2
        probability = tl.exp2(scores - lse_log2[:, None])
        dp = dot(dout, tl.trans(v_tile), PRECISION)
        if HAS_DROPOUT:
            query = (first_position + row.to(tl.int64) * rate).to(tl.int32)
            dp *= keep_factor(
                seed, branch, sequence, query[:, None], position.to(tl.int32)[None, :], dropout_p
            )
        ds = probability * (dp - delta[:, None])
        if MASKED:
            if IS_CAUSAL:
                seen = (key[None, :] <= row[:, None]) & inside[None, :]
            else:
                seen = inside[None, :]
            ds = tl.where(seen, ds, 0.0)
        if key_mask is not None:
            hidden = tl.load(key_mask + position * mask_stride_s, mask=inside, other=1)
            ds = tl.where(hidden[None, :] != 0, 0.0, ds)
        dq += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
    return dq


@triton.jit
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
    """Dq of one tile of queries from the keys of one branch.

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
    position = first_position + row.to(tl.int64) * rate

    wide_head = head.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    q += batch * q_stride_b + wide_head * q_stride_h
    dout += batch * dout_stride_b + wide_head * dout_stride_h
    k += batch * k_stride_b + kv_head * k_stride_h
    v += batch * v_stride_b + kv_head * v_stride_h
    if key_mask is not None:
        key_mask += batch * mask_stride_b + kv_head * mask_stride_h
    q_tile = load_rows(q, position, q_stride_s, inside, dims, HEAD_DIM, True)
    dout_tile = load_rows(dout, position, dout_stride_s, inside, dims, HEAD_DIM, True)

    result_row = (batch * seq_len + position) * num_heads + head
    row_lse = tl.load(lse + result_row, mask=inside, other=float("inf"))
    # A row without keys has lse −∞ and probabilities 0, as one with lse +∞.
    lse_log2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    row_delta = tl.load(delta + result_row, mask=inside, other=0.0)

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
        k_stride_s, v_stride_s, mask_stride_s,
        0, unmasked, num_rows, first_position, rate, row, dims,
        scale_log2, dropout_p, seed, branch, sequence,
        HEAD_DIM, BLOCK_N, False, IS_CAUSAL, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    total = _sum_over_keys(
        total, q_tile, dout_tile, lse_log2, row_delta, k, v, key_mask,
        k_stride_s, v_stride_s, mask_stride_s,
        unmasked, stop_key, num_rows, first_position, rate, row, dims,
        scale_log2, dropout_p, seed, branch, sequence,
        HEAD_DIM, BLOCK_N, True, IS_CAUSAL, HAS_DROPOUT, PRECISION,
    )  # fmt: skip
    total *= scale
    result = result_row[:, None] * HEAD_DIM + dims[None, :]
    tile_mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    if partial is not None:
        total += tl.load(partial + result, mask=tile_mask, other=0.0)
    tl.store(dq + result, total.to(dq.dtype.element_ty), mask=tile_mask)


@triton.jit
def _sum_over_queries(
    dk, dv, k, v, hidden, q, dout, lse, delta,
    q_stride_s, dout_stride_s, row_stride_s,
    first_query, stop_query, num_rows, first_position, rate, row, dims,
    scale_log2, dropout_p, seed, branch, sequence,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dsᵀ·q and pᵀ·dout over the queries from `first_query` to `stop_query`.

    Tiles are keys × queries. MASKED: some queries lie beyond the segment or, causal, before a key.
    """
    lane = tl.arange(0, BLOCK_M)
    for start in range(first_query, stop_query, BLOCK_M):
        query = start + lane
        position = first_position + query.to(tl.int64) * rate
        inside = query < num_rows
        q_tile = load_rows(q, position, q_stride_s, inside, dims, HEAD_DIM, MASKED)
        dout_tile = load_rows(dout, position, dout_stride_s, inside, dims, HEAD_DIM, MASKED)
        if MASKED:
            # Rows beyond the segment get lse +∞, hence probability 0.
            row_lse = tl.load(lse + position * row_stride_s, mask=inside, other=float("inf"))
            row_delta = tl.load(delta + position * row_stride_s, mask=inside, other=0.0)
        else:
            row_lse = tl.load(lse + position * row_stride_s)
            row_delta = tl.load(delta + position * row_stride_s)
        lse_log2 = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
        scores = dot(k, tl.trans(q_tile), PRECISION) * scale_log2
        probability = tl.exp2(scores - lse_log2[None, :])
        if MASKED and IS_CAUSAL:
            probability = tl.where(query[None, :] >= row[:, None], probability, 0.0)
        if HAS_MASK:
            probability = tl.where(hidden[:, None] != 0, 0.0, probability)
        dp = dot(v, tl.trans(dout_tile), PRECISION)
        if HAS_DROPOUT:
            key_position = (first_position + row.to(tl.int64) * rate).to(tl.int32)
            keep = keep_factor(
                *(seed, branch, sequence),
                *(position.to(tl.int32)[None, :], key_position[:, None], dropout_p),
            )
            dp *= keep
            dv += dot((probability * keep).to(dout_tile.dtype), dout_tile, PRECISION)
        else:
            dv += dot(probability.to(dout_tile.dtype), dout_tile, PRECISION)
        ds = probability * (dp - row_delta[None, :])
        dk += dot(ds.to(q_tile.dtype), q_tile, PRECISION)
    return dk, dv


@triton.jit
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
    """Dk and dv of one tile of keys from the queries of one branch.

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
    position = first_position + row.to(tl.int64) * rate

    wide_kv_head = kv_head.to(tl.int64)
    k += batch * k_stride_b + wide_kv_head * k_stride_h
    v += batch * v_stride_b + wide_kv_head * v_stride_h
    k_tile = load_rows(k, position, k_stride_s, inside, dims, HEAD_DIM, True)
    v_tile = load_rows(v, position, v_stride_s, inside, dims, HEAD_DIM, True)
    hidden = row
    if key_mask is not None:
        key_mask += batch * mask_stride_b + wide_kv_head * mask_stride_h
        hidden = tl.load(key_mask + position * mask_stride_s, mask=inside, other=1)

    dk_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    scale_log2 = scale * LOG2_E
    if IS_CAUSAL:
        # Queries before the tile see none of its keys; those in it or astride its end, some.
        first_query = first_row // BLOCK_M * BLOCK_M
        diagonal = tl.minimum((first_row + BLOCK_N + BLOCK_M - 1) // BLOCK_M * BLOCK_M, num_rows)
    else:
        first_query = 0
        diagonal = 0
    unmasked = tl.maximum(num_rows // BLOCK_M * BLOCK_M, diagonal)
    for i in range(num_heads_here):
        head = first_head + i * head_step
        wide_head = head.to(tl.int64)
        q_head = q + batch * q_stride_b + wide_head * q_stride_h
        dout_head = dout + batch * dout_stride_b + wide_head * dout_stride_h
        lse_head = lse + batch * seq_len * num_heads + head
        delta_head = delta + batch * seq_len * num_heads + head
        sequence = ((batch * num_heads + head) % 2147483647).to(tl.int32)
        if IS_CAUSAL:
            dk_total, dv_total = _sum_over_queries(
                dk_total, dv_total, k_tile, v_tile, hidden, q_head, dout_head, lse_head, delta_head,
                q_stride_s, dout_stride_s, num_heads,
                first_query, diagonal, num_rows, first_position, rate, row, dims,
                scale_log2, dropout_p, seed, branch, sequence,
                HEAD_DIM, BLOCK_M, True, True, key_mask is not None, HAS_DROPOUT, PRECISION,
            )  # fmt: skip
        dk_total, dv_total = _sum_over_queries(
            dk_total, dv_total, k_tile, v_tile, hidden, q_head, dout_head, lse_head, delta_head,
            q_stride_s, dout_stride_s, num_heads,
            diagonal, unmasked, num_rows, first_position, rate, row, dims,
            scale_log2, dropout_p, seed, branch, sequence,
            HEAD_DIM, BLOCK_M, False, IS_CAUSAL, key_mask is not None, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
        dk_total, dv_total = _sum_over_queries(
            dk_total, dv_total, k_tile, v_tile, hidden, q_head, dout_head, lse_head, delta_head,
            q_stride_s, dout_stride_s, num_heads,
            unmasked, num_rows, num_rows, first_position, rate, row, dims,
            scale_log2, dropout_p, seed, branch, sequence,
            HEAD_DIM, BLOCK_M, True, IS_CAUSAL, key_mask is not None, HAS_DROPOUT, PRECISION,
        )  # fmt: skip
    dk_total *= scale

    result_row = (batch * seq_len + position) * num_kv_heads + kv_head
    result = result_row[:, None] * HEAD_DIM + dims[None, :]
    tile_mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    if dk_partial is not None:
        dk_total += tl.load(dk_partial + result, mask=tile_mask, other=0.0)
        dv_total += tl.load(dv_partial + result, mask=tile_mask, other=0.0)
    tl.store(dk + result, dk_total.to(dk.dtype.element_ty), mask=tile_mask)
    tl.store(dv + result, dv_total.to(dv.dtype.element_ty), mask=tile_mask)
