"""Kernels of block-sparse attention: forward and dq walk rows of blocks, dk and dv columns.

B batch, S positions, N blocks of BLOCK_SIZE positions, P lists; tiles of BLOCK_M queries and
BLOCK_N keys, which divide BLOCK_SIZE: a block is walked in BLOCK_SIZE / BLOCK_N steps. A program
that reads only listed blocks does the work of these blocks alone.

Each row of a result belongs to one program, so there are no atomics, and the same inputs give the
same bits. Lengths and lists are arguments that no kernel is compiled for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dilated_kernels.fused.addressing import load_rows, row_pointers, row_zero
from dilated_kernels.fused.arithmetic import LN_2, LOG2_E, dot

# As in `addressing.NOT_SPECIALIZED`: a kernel compiled for such values is not faster.
NOT_SPECIALIZED = ("seq_len", "num_heads", "group", "num_blocks", "heads_per_list", "tiles")


@triton.jit
def _listed(offsets, list_number, block, num_blocks, STEPS_PER_BLOCK: tl.constexpr):
    """The first entry (int64) of a row or column in its list, and the steps over its blocks."""
    offsets += list_number * (num_blocks + 1) + block
    start = tl.load(offsets)
    return start, ((tl.load(offsets + 1) - start) * STEPS_PER_BLOCK).to(tl.int32)


@triton.jit
def _first_of_step(
    blocks, start, step, STEPS_PER_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The first position of the tile of BLOCK positions that a step walks to."""
    block = tl.load(blocks + start + step // STEPS_PER_BLOCK)
    return block * BLOCK_SIZE + step % STEPS_PER_BLOCK * BLOCK


@triton.jit
def _visible_keys(key_mask, mask_row_stride, key, seq_len):
    """Which keys exist and are not masked. Others are never read: they may hold NaN."""
    visible = key < seq_len
    if key_mask is not None:
        hidden = tl.load(key_mask + key.to(tl.int64) * mask_row_stride, mask=visible, other=1)
        visible = visible & (hidden == 0)
    return visible


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q, k, v, key_mask, row_offsets, key_blocks, out, lse,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s,
    seq_len, num_heads, group, num_blocks, heads_per_list, tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of queries of one head over the blocks of its row.

    Args:
        q, k, v: `(B, S, H, D)` and `(B, S, H_kv, D)` by their strides, the last of which is 1.
        key_mask: uint8 `(B, S)`, not 0 where a key is hidden; or None.
        row_offsets, key_blocks: See `BlockLists`.
        out: Contiguous `(B, S, H, D)`.
        lse: float32 `(B, S, H)`, contiguous.
        group: H / H_kv.
        heads_per_list: H / P.
        tiles: ⌈S / BLOCK_M⌉.
        WIDE: See `addressing.row_offsets`.
    """
    program = tl.program_id(0)
    first_row = program % tiles * BLOCK_M
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane
    inside = row < seq_len
    dims = tl.arange(0, BLOCK_D)
    q = row_zero(q, batch, head, 0, q_stride_b, q_stride_s, q_stride_h)
    k = row_zero(k, batch, head // group, 0, k_stride_b, k_stride_s, k_stride_h)
    v = row_zero(v, batch, head // group, 0, v_stride_b, v_stride_s, v_stride_h)
    if key_mask is not None:
        key_mask += batch * mask_stride_b
    q_stride_s = tl.cast(q_stride_s, tl.int64)
    k_stride_s = tl.cast(k_stride_s, tl.int64)
    v_stride_s = tl.cast(v_stride_s, tl.int64)
    q_tile = load_rows(q, first_row, lane, q_stride_s, inside, dims, HEAD_DIM, True, WIDE)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    key_lane = tl.arange(0, BLOCK_N)
    start, steps = _listed(
        row_offsets, head // heads_per_list, first_row // BLOCK_SIZE, num_blocks, STEPS
    )
    for step in range(steps):
        first_key = _first_of_step(key_blocks, start, step, STEPS, BLOCK_N, BLOCK_SIZE)
        key = first_key + key_lane
        visible = _visible_keys(key_mask, mask_stride_s, key, seq_len)
        k_tile = load_rows(k, first_key, key_lane, k_stride_s, visible, dims, HEAD_DIM, True, WIDE)
        v_tile = load_rows(v, first_key, key_lane, v_stride_s, visible, dims, HEAD_DIM, True, WIDE)
        seen = visible[None, :]
        if IS_CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        scores = dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E)
        scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # Without the zero, a row that has seen no key yet would compute −inf − (−inf).
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        probability = tl.exp2(scores - shift[:, None])
        correction = tl.exp2(row_max - shift)
        row_sum = row_sum * correction + tl.sum(probability, 1)
        acc = acc * correction[:, None] + dot(probability.to(v_tile.dtype), v_tile, PRECISION)
        row_max = new_max

    is_empty = row_sum == 0.0
    total = tl.where(is_empty, 1.0, row_sum)
    acc *= (1.0 / total)[:, None]
    row_lse = tl.where(is_empty, float("-inf"), (row_max + tl.log2(total)) * LN_2)
    first_result = batch * seq_len * num_heads + head
    _store_rows(
        out + first_result * HEAD_DIM, acc, num_heads * HEAD_DIM,
        first_row, lane, inside, dims, HEAD_DIM, WIDE,
    )  # fmt: skip
    tl.store(lse + first_result + row.to(tl.int64) * num_heads, row_lse, mask=inside)


@triton.jit
def _store_rows(
    base, tile, row_stride, first, lane, inside, dims, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr
):
    """Store a tile in the rows of one head, converted to their dtype."""
    pointers = row_pointers(base, first, lane, tl.cast(row_stride, tl.int64), dims, WIDE)
    mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dq_kernel(
    q, k, v, key_mask, row_offsets, key_blocks, dout, lse, delta, dq,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s,
    dout_stride_b, dout_stride_s, dout_stride_h,
    seq_len, num_heads, group, num_blocks, heads_per_list, tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradient dq of one tile of queries from the blocks of its row.

    Args: As for `forward_kernel`, and
        dout: By its strides.
        lse, delta: float32 `(B, S, H)`, contiguous; see `BlockSparseBackend`.
        dq: Contiguous `(B, S, H, D)`.
    """
    program = tl.program_id(0)
    first_row = program % tiles * BLOCK_M
    head = program // tiles % num_heads
    batch = (program // tiles // num_heads).to(tl.int64)
    lane = tl.arange(0, BLOCK_M)
    row = first_row + lane
    inside = row < seq_len
    dims = tl.arange(0, BLOCK_D)
    q = row_zero(q, batch, head, 0, q_stride_b, q_stride_s, q_stride_h)
    dout = row_zero(dout, batch, head, 0, dout_stride_b, dout_stride_s, dout_stride_h)
    k = row_zero(k, batch, head // group, 0, k_stride_b, k_stride_s, k_stride_h)
    v = row_zero(v, batch, head // group, 0, v_stride_b, v_stride_s, v_stride_h)
    if key_mask is not None:
        key_mask += batch * mask_stride_b
    q_stride_s = tl.cast(q_stride_s, tl.int64)
    k_stride_s = tl.cast(k_stride_s, tl.int64)
    v_stride_s = tl.cast(v_stride_s, tl.int64)
    dout_stride_s = tl.cast(dout_stride_s, tl.int64)
    q_tile = load_rows(q, first_row, lane, q_stride_s, inside, dims, HEAD_DIM, True, WIDE)
    dout_tile = load_rows(dout, first_row, lane, dout_stride_s, inside, dims, HEAD_DIM, True, WIDE)
    first_result = batch * seq_len * num_heads + head
    in_rows = first_result + row.to(tl.int64) * num_heads
    row_lse = tl.load(lse + in_rows, mask=inside, other=float("inf")) * LOG2_E
    row_delta = tl.load(delta + in_rows, mask=inside, other=0.0)

    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = BLOCK_SIZE // BLOCK_N
    key_lane = tl.arange(0, BLOCK_N)
    start, steps = _listed(
        row_offsets, head // heads_per_list, first_row // BLOCK_SIZE, num_blocks, STEPS
    )
    for step in range(steps):
        first_key = _first_of_step(key_blocks, start, step, STEPS, BLOCK_N, BLOCK_SIZE)
        key = first_key + key_lane
        visible = _visible_keys(key_mask, mask_stride_s, key, seq_len)
        k_tile = load_rows(k, first_key, key_lane, k_stride_s, visible, dims, HEAD_DIM, True, WIDE)
        v_tile = load_rows(v, first_key, key_lane, v_stride_s, visible, dims, HEAD_DIM, True, WIDE)
        seen = visible[None, :]
        if IS_CAUSAL:
            seen = seen & (key[None, :] <= row[:, None])
        scores = dot(q_tile, tl.trans(k_tile), PRECISION) * (scale * LOG2_E)
        probability = tl.where(seen, tl.exp2(scores - row_lse[:, None]), 0.0)
        ds = probability * (dot(dout_tile, tl.trans(v_tile), PRECISION) - row_delta[:, None])
        total += dot(ds.to(k_tile.dtype), k_tile, PRECISION)
    _store_rows(
        dq + first_result * HEAD_DIM, total * scale, num_heads * HEAD_DIM,
        first_row, lane, inside, dims, HEAD_DIM, WIDE,
    )  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def dk_dv_kernel(
    q, k, v, key_mask, column_offsets, query_blocks, dout, lse, delta, dk, dv,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, mask_stride_b, mask_stride_s,
    dout_stride_b, dout_stride_s, dout_stride_h,
    seq_len, num_heads, group, num_blocks, heads_per_list, tiles, scale,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, IS_CAUSAL: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Gradients dk and dv of one tile of keys from the blocks of its column.

    A program serves all heads of q that share a head of k and v; each may have another list.

    Args: As for `dq_kernel`, and
        column_offsets, query_blocks: See `BlockLists`.
        dk, dv: Contiguous `(B, S, H_kv, D)`.
        tiles: ⌈S / BLOCK_N⌉.
    """
    program = tl.program_id(0)
    num_kv_heads = num_heads // group
    first_key = program % tiles * BLOCK_N
    kv_head = program // tiles % num_kv_heads
    batch = (program // tiles // num_kv_heads).to(tl.int64)
    key_lane = tl.arange(0, BLOCK_N)
    key = first_key + key_lane
    dims = tl.arange(0, BLOCK_D)
    k = row_zero(k, batch, kv_head, 0, k_stride_b, k_stride_s, k_stride_h)
    v = row_zero(v, batch, kv_head, 0, v_stride_b, v_stride_s, v_stride_h)
    if key_mask is not None:
        key_mask += batch * mask_stride_b
    k_stride_s = tl.cast(k_stride_s, tl.int64)
    v_stride_s = tl.cast(v_stride_s, tl.int64)
    q_stride_s = tl.cast(q_stride_s, tl.int64)
    dout_stride_s = tl.cast(dout_stride_s, tl.int64)
    visible = _visible_keys(key_mask, mask_stride_s, key, seq_len)
    k_tile = load_rows(k, first_key, key_lane, k_stride_s, visible, dims, HEAD_DIM, True, WIDE)
    v_tile = load_rows(v, first_key, key_lane, v_stride_s, visible, dims, HEAD_DIM, True, WIDE)

    dk_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    STEPS: tl.constexpr = BLOCK_SIZE // BLOCK_M
    lane = tl.arange(0, BLOCK_M)
    for member in range(group):
        head = kv_head * group + member
        head_q = row_zero(q, batch, head, 0, q_stride_b, q_stride_s, q_stride_h)
        head_dout = row_zero(dout, batch, head, 0, dout_stride_b, dout_stride_s, dout_stride_h)
        start, steps = _listed(
            column_offsets, head // heads_per_list, first_key // BLOCK_SIZE, num_blocks, STEPS
        )
        for step in range(steps):
            first_row = _first_of_step(query_blocks, start, step, STEPS, BLOCK_M, BLOCK_SIZE)
            row = first_row + lane
            inside = row < seq_len
            q_tile = load_rows(
                head_q, first_row, lane, q_stride_s, inside, dims, HEAD_DIM, True, WIDE
            )
            dout_tile = load_rows(
                head_dout, first_row, lane, dout_stride_s, inside, dims, HEAD_DIM, True, WIDE
            )
            in_rows = batch * seq_len * num_heads + head + row.to(tl.int64) * num_heads
            row_lse = tl.load(lse + in_rows, mask=inside, other=float("inf")) * LOG2_E
            row_delta = tl.load(delta + in_rows, mask=inside, other=0.0)
            seen = visible[:, None]
            if IS_CAUSAL:
                seen = seen & (key[:, None] <= row[None, :])
            scores = dot(k_tile, tl.trans(q_tile), PRECISION) * (scale * LOG2_E)
            probability = tl.where(seen, tl.exp2(scores - row_lse[None, :]), 0.0)
            dv_total += dot(probability.to(dout_tile.dtype), dout_tile, PRECISION)
            ds = probability * (dot(v_tile, tl.trans(dout_tile), PRECISION) - row_delta[None, :])
            dk_total += dot(ds.to(q_tile.dtype), q_tile, PRECISION)
    first_result = (batch * seq_len * num_kv_heads + kv_head) * HEAD_DIM
    inside_keys = key < seq_len
    row_stride = num_kv_heads * HEAD_DIM
    _store_rows(
        dk + first_result, dk_total * scale, row_stride,
        first_key, key_lane, inside_keys, dims, HEAD_DIM, WIDE,
    )  # fmt: skip
    _store_rows(
        dv + first_result, dv_total, row_stride,
        first_key, key_lane, inside_keys, dims, HEAD_DIM, WIDE,
    )  # fmt: skip
