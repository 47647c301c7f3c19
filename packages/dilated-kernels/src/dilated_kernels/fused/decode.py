"""Decode kernels: the newest token against the cache, all branches in one launch.

B batch, H heads, H_kv heads of k and v, D head_dim.

In one branch, heads of q that share a head of k and v see the rows of one block or of none: the
block of the offset at which the branch keeps the newest position. So each head of k and v has one
list of keys, the rows of its branches one after the other, and each head of q sees a subset of the
branches. Programs share the list: each takes `keys_per_split` keys for up to 16 heads of q,
wherever branches begin and end, and `merge_kernel` combines their results. A short list needs no
merge.

The newest token is not read from the cache. It counts once for each branch that keeps it, and the
softmax of the first program starts with it. That program also writes it to its rows, which no
program reads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_kernels.fused.arithmetic import LN_2, LOG2_E, dot


@triton.jit
def _locate_keys(
    branch_table, offsets, first_rows, position, head, head_exists, num_heads, num_branches,
    BLOCK_R: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Where the keys of a tile of heads are, per branch (R): rows behind the newest token's.

    Returns:
        keeps: bool `(heads, R)`, whether a branch keeps the position for a head.
        is_kept: bool `(R,)`, whether it does for any.
        start, end: int64 `(R,)`, its part of the list of keys; empty unless kept.
        shift: int64 `(R,)`, from a place in that part to the row in the cache.
        newest: int64 `(R,)`, the row of the newest token.
    """
    branch = tl.arange(0, BLOCK_R)
    exists = branch < num_branches
    segment_length = tl.load(branch_table + 2 * branch, mask=exists, other=1)
    rate = tl.load(branch_table + 2 * branch + 1, mask=exists, other=1)
    if not WIDE:
        # A segment that does not end before 2³¹ − 1 has the same rows if it ends there.
        segment_length = tl.minimum(segment_length, 2147483647).to(tl.int32)
        rate = tl.minimum(rate, 2147483647).to(tl.int32)
        position = position.to(tl.int32)
    index = position % segment_length
    rows = index // rate
    offset_now = index - rows * rate
    rows = rows.to(tl.int64)
    cell = branch[None, :] * num_heads + head[:, None]
    cell_exists = exists[None, :] & head_exists[:, None]
    offset = tl.load(offsets + cell, mask=cell_exists, other=-1)
    keeps = offset == offset_now[None, :]
    # The heads that a branch keeps read one block.
    first = tl.load(first_rows + cell, mask=cell_exists, other=0)
    first = tl.max(tl.where(keeps, first, -1), 0)
    is_kept = first >= 0
    count = tl.where(is_kept, rows, 0)
    end = tl.cumsum(count, 0)
    start = end - count
    return keeps, is_kept, start, end, first - start, first + rows


@triton.jit
def _load_tile(base, row, dims, mask, HEAD_DIM: tl.constexpr):
    return tl.load(base + row[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _finite(x):
    """The number to subtract from scores whose maximum is x: −inf − (−inf) would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def _attend_one_head(
    q, k, v, keys, values, times, start, end, shift, first_key, stop_key, dims, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Softmax of one head: maximum (log2), sum, values; `(1,)`, `(1,)`, `(1, BLOCK_D)`.

    Decoding is bound by memory, so sums of products are as fast as a matrix product of one row.
    Each lane has its own softmax, and the lanes are merged at the end.
    """
    lane = tl.arange(0, BLOCK_N)
    q = q.to(tl.float32)
    # Lane 0 starts with the newest token.
    lane_sum = tl.where(lane == 0, times, 0.0)
    newest = tl.sum(q * k.to(tl.float32)[None, :], 1) * scale_log2
    lane_max = tl.where(lane_sum > 0, newest, float("-inf"))
    acc = tl.where((lane_sum > 0)[:, None], lane_sum[:, None] * v.to(tl.float32)[None, :], 0.0)
    for tile in range(first_key, stop_key, BLOCK_N):
        key = tile + lane
        inside = key < stop_key
        of_branch = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        row = key + tl.sum(tl.where(of_branch, shift[None, :], 0), 1)
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        k_tile = _load_tile(keys, row, dims, mask, HEAD_DIM).to(tl.float32)
        v_tile = _load_tile(values, row, dims, mask, HEAD_DIM).to(tl.float32)
        scores = tl.where(inside, tl.sum(q * k_tile, 1) * scale_log2, float("-inf"))
        new_max = tl.maximum(lane_max, scores)
        probability = tl.exp2(scores - _finite(new_max))
        correction = tl.exp2(lane_max - _finite(new_max))
        lane_sum = lane_sum * correction + probability
        acc = acc * correction[:, None] + probability[:, None] * v_tile
        lane_max = new_max
    row_max = tl.max(lane_max, 0, keep_dims=True)
    weight = tl.exp2(lane_max - _finite(row_max))
    row_sum = tl.sum(lane_sum * weight, 0, keep_dims=True)
    return row_max, row_sum, tl.sum(acc * weight[:, None], 0, keep_dims=True)


@triton.jit
def _attend_heads(
    q, k, v, keys, values, times, keeps, start, end, shift, first_key, stop_key, dims, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax of 16 heads that share loads: `(BLOCK_H,)`, `(BLOCK_H,)`, `(BLOCK_H, BLOCK_D)`."""
    lane = tl.arange(0, BLOCK_N)
    slot = tl.arange(0, BLOCK_H)
    # Each head starts with the newest token.
    row_sum = times
    newest = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale_log2
    row_max = tl.where(times > 0, newest, float("-inf"))
    acc = tl.where((times > 0)[:, None], times[:, None] * v.to(tl.float32)[None, :], 0.0)
    # The heads that see a branch, as bits; each key selects the bits of its branch.
    readers = tl.sum(keeps.to(tl.int32) << slot[:, None], 0)
    for tile in range(first_key, stop_key, BLOCK_N):
        key = tile + lane
        inside = key < stop_key
        of_branch = (key[:, None] >= start[None, :]) & (key[:, None] < end[None, :])
        row = key + tl.sum(tl.where(of_branch, shift[None, :], 0), 1)
        readers_of_key = tl.sum(tl.where(of_branch, readers[None, :], 0), 1)
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        k_tile = _load_tile(keys, row, dims, mask, HEAD_DIM)
        v_tile = _load_tile(values, row, dims, mask, HEAD_DIM)
        seen = ((readers_of_key[None, :] >> slot[:, None]) & 1) != 0
        scores = dot(q, tl.trans(k_tile), PRECISION) * scale_log2
        scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        probability = tl.exp2(scores - _finite(new_max)[:, None])
        correction = tl.exp2(row_max - _finite(new_max))
        row_sum = row_sum * correction + tl.sum(probability, 1)
        acc = acc * correction[:, None] + dot(probability.to(v_tile.dtype), v_tile, PRECISION)
        row_max = new_max
    return row_max, row_sum, acc


@triton.jit
def _store_result(out, lse, row, exists, dims, row_max, row_sum, acc, HEAD_DIM: tl.constexpr):
    """Rows of out and lse from a softmax that is complete; `row` is batch · H + head."""
    is_empty = row_sum == 0.0
    total = tl.where(is_empty, 1.0, row_sum)
    row_lse = tl.where(is_empty, float("-inf"), (row_max + tl.log2(total)) * LN_2)
    tl.store(lse + row, row_lse, mask=exists)
    tl.store(
        out + row[:, None] * HEAD_DIM + dims[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=exists[:, None] & (dims < HEAD_DIM)[None, :],
    )


# These change from step to step; specialising on them would compile a kernel every few steps.
@triton.jit(do_not_specialize=["position", "splits", "keys_per_split"])
def decode_kernel(
    q, k, v, keys, values, branch_table, offsets, first_rows, out, lse, partial, partial_stats,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    cache_rows, num_heads, num_kv_heads, num_branches,
    position: tl.int64, splits: tl.int32, keys_per_split: tl.int64, scale,
    HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of up to BLOCK_H heads of q over one part of the keys of their head of k and v.

    Args:
        q, k, v: `(B, 1, H, D)` and `(B, 1, H_kv, D)` by their strides, the last of which is 1.
        keys, values: The cache, contiguous `(B, cache_rows, D)`.
        branch_table, offsets, first_rows: See `dilated_core.backends.cache_layout.CacheLayout`.
        out, lse: `(B, H, D)` and float32 `(B, H)`, contiguous; written unless there is `partial`.
        partial: float32 `(B, H, splits, D)`, contiguous, unnormalised; or None.
        partial_stats: float32 `(B, H, splits, 2)`: maximum score, log2, and sum; or None.
        position: Of the newest token.
        WIDE: Whether `position` needs more than 32 bits; a 64-bit division is a subroutine.
    """
    program = tl.program_id(0)
    split = program % splits
    group = num_heads // num_kv_heads
    tiles = (group + BLOCK_H - 1) // BLOCK_H
    outer = program // splits
    tile = outer % tiles
    kv_head = (outer // tiles) % num_kv_heads
    batch = (outer // tiles // num_kv_heads).to(tl.int64)
    slot = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    head = kv_head * group + slot
    head_exists = slot < group
    dims = tl.arange(0, BLOCK_D)
    inside_dims = dims < HEAD_DIM
    keeps, is_kept, start, end, shift, newest = _locate_keys(
        branch_table, offsets, first_rows, position, head, head_exists, num_heads, num_branches,
        BLOCK_R, WIDE,
    )  # fmt: skip

    q_tile = tl.load(
        q + batch * q_stride_b + head.to(tl.int64)[:, None] * q_stride_h + dims[None, :],
        mask=head_exists[:, None] & inside_dims[None, :],
        other=0.0,
    )
    kv_head = kv_head.to(tl.int64)
    k_new = tl.load(k + batch * k_stride_b + kv_head * k_stride_h + dims, mask=inside_dims, other=0)
    v_new = tl.load(v + batch * v_stride_b + kv_head * v_stride_h + dims, mask=inside_dims, other=0)
    keys += batch * cache_rows * HEAD_DIM
    values += batch * cache_rows * HEAD_DIM
    if split == 0:
        places = newest[:, None] * HEAD_DIM + dims[None, :]
        mask = is_kept[:, None] & inside_dims[None, :]
        tl.store(keys + places, tl.broadcast_to(k_new[None, :], places.shape), mask=mask)
        tl.store(values + places, tl.broadcast_to(v_new[None, :], places.shape), mask=mask)

    times = tl.where(split == 0, tl.sum(keeps.to(tl.float32), 1), 0.0)
    first_key = split * keys_per_split
    stop_key = tl.minimum(first_key + keys_per_split, tl.max(end, 0))
    scale_log2 = scale * LOG2_E
    if BLOCK_H == 1:
        row_max, row_sum, acc = _attend_one_head(
            q_tile, k_new, v_new, keys, values, times, start, end, shift,
            first_key, stop_key, dims, scale_log2, HEAD_DIM, BLOCK_N,
        )  # fmt: skip
    else:
        row_max, row_sum, acc = _attend_heads(
            q_tile, k_new, v_new, keys, values, times, keeps, start, end, shift,
            first_key, stop_key, dims, scale_log2, HEAD_DIM, BLOCK_H, BLOCK_N, PRECISION,
        )  # fmt: skip
    row = batch * num_heads + head
    if partial is None:
        _store_result(out, lse, row, head_exists, dims, row_max, row_sum, acc, HEAD_DIM)
    else:
        place = row * splits + split
        mask = head_exists[:, None] & inside_dims[None, :]
        tl.store(partial + place[:, None] * HEAD_DIM + dims[None, :], acc, mask=mask)
        tl.store(partial_stats + 2 * place, row_max, mask=head_exists)
        tl.store(partial_stats + 2 * place + 1, row_sum, mask=head_exists)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    partial, partial_stats, out, lse, splits: tl.int32,
    HEAD_DIM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """Out and lse of one head of one batch row from the parts of `decode_kernel`."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    first = tl.program_id(0).to(tl.int64) * splits
    dims = tl.arange(0, BLOCK_D)
    every = tl.arange(0, MAX_SPLITS)
    stats = partial_stats + 2 * (first + every)
    maxima = tl.load(stats, mask=every < splits, other=float("-inf"))
    sums = tl.load(stats + 1, mask=every < splits, other=0.0)
    row_max = tl.max(maxima, 0, keep_dims=True)
    row_sum = tl.sum(sums * tl.exp2(maxima - _finite(row_max)), 0, keep_dims=True)
    lane = tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for start in range(0, splits, BLOCK_S):
        split = start + lane
        inside = split < splits
        places = partial_stats + 2 * (first + split)
        weight = tl.exp2(tl.load(places, mask=inside, other=float("-inf")) - _finite(row_max))
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        acc += weight[:, None] * _load_tile(partial, first + split, dims, mask, HEAD_DIM)
    total = tl.sum(acc, 0, keep_dims=True)
    _store_result(out, lse, row, row >= 0, dims, row_max, row_sum, total, HEAD_DIM)
