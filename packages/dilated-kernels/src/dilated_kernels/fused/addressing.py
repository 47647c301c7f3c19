"""Which rows a program works on: the pattern's arithmetic, as the kernels do it.

A branch cuts the sequence into segments of w positions; in each, a head with offset o keeps the
positions o, o + r, o + 2r, …: its rows, counted j = 0, 1, …. A tile is a block of neighbouring rows
of one head in one segment. Nothing is gathered: row j of a segment that starts at position s is
the tensor's row s + o + r·j, so from row 0 on rows are r · (stride of S) elements apart. Offsets
have 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compiles a kernel anew for integers that are 1 or divisible by 16. These change from call
# to call, or from branch to branch, and would gain nothing.
NOT_SPECIALIZED = (
    *("seq_len", "num_heads", "group", "segment_length", "rate", "heads_per_offset"),
    *("cells", "tiles", "slots", "seed", "branch", "num_rows"),
)


@triton.jit
def locate_program(order, cells):
    """Cell (one tile of one segment) and outer index of this program.

    Cells vary fastest: programs that run at one time then share keys. With `order`, an int32 table
    of `cells` entries, they come in that order.
    """
    program = tl.program_id(0)
    cell = program % cells
    outer = program // cells
    if order is not None:
        cell = tl.load(order + cell)
    return cell, outer


@triton.jit
def locate_segment(segment, segments, seq_len, segment_length):
    """Start of a segment, its length, and w clipped to its sequence; all in positions.

    `segments` is None, or with packed documents an int64 table of these three numbers per segment.
    """
    if segments is not None:
        start = tl.load(segments + 3 * segment)
        length = tl.load(segments + 3 * segment + 1)
        clipped = tl.load(segments + 3 * segment + 2)
    else:
        start = segment.to(tl.int64) * segment_length
        length = tl.minimum(seq_len - start, segment_length)
        clipped = start * 0 + segment_length
    return start, length, clipped


@triton.jit
def head_offset(head, rate, heads_per_offset, BLOCKED: tl.constexpr):
    """Offset of a head: see `dilated_core.pattern.head_offset`."""
    if BLOCKED:
        return head // heads_per_offset
    return head % rate


@triton.jit
def kept_rows(length, rate, offset):
    """Rows that a head with this offset keeps of `length` positions."""
    return (tl.maximum(length - offset, 0) + rate - 1) // rate


@triton.jit
def heads_of_slot(kv_head, slot, rate, group, heads_per_offset, BLOCKED: tl.constexpr):
    """The heads of q that read one head of k and v at one offset: first, step, count.

    Among the `group` heads of q that share a head of k and v, each offset is one slot, so that
    every row of dk and dv belongs to one program.
    """
    first_of_group = kv_head * group
    if BLOCKED:
        offset = first_of_group // heads_per_offset + slot
        first = tl.maximum(first_of_group, offset * heads_per_offset)
        stop = tl.minimum(first_of_group + group, (offset + 1) * heads_per_offset)
        return first, 1, tl.maximum(stop - first, 0)
    return first_of_group + slot, rate, (group - slot + rate - 1) // rate


@triton.jit
def row_pointers(base, row, row_stride, dims):
    """Pointers `(rows, BLOCK_D)` to rows of one head, `row_stride` (int64) elements apart."""
    return base + row.to(tl.int64)[:, None] * row_stride + dims[None, :]


@triton.jit
def load_rows(base, row, row_stride, inside, dims, HEAD_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows of one head: `(rows, BLOCK_D)`, zero beyond HEAD_DIM and, MASKED, where not `inside`.

    Args:
        base: Pointer to row 0.
        row: Numbers of the rows, int32.
        row_stride: int64.
        inside: Which of the rows exist.
        dims: `tl.arange(0, BLOCK_D)`.
    """
    pointers = row_pointers(base, row, row_stride, dims)
    # Every branch ends in a return, because what follows one would be compiled as well.
    if MASKED:
        if dims.shape[0] == HEAD_DIM:
            return tl.load(pointers, mask=inside[:, None], other=0.0)
        else:
            return tl.load(pointers, mask=inside[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    else:
        if dims.shape[0] == HEAD_DIM:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
