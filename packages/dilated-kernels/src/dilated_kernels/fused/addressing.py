"""Which rows a program works on: the pattern's arithmetic, as the kernels compute it.

A branch cuts the sequence into segments of w positions; in each, a head with offset o keeps the
positions o, o + r, o + 2r, …: its rows, counted j = 0, 1, …. A tile is a block of neighbouring rows
of one head in one segment. Nothing is gathered: row j of a segment that starts at position s is
the tensor's row s + o + r·j, so the rows are r · (stride of S) elements apart. The start of a tile
is computed in 64 bits; offsets within a tile take 32 (see `row_offsets`).
"""

from __future__ import annotations

import triton
import triton.language as tl

# A condition on a constant needs its `else`: Triton also compiles the code after a return, and
# returns of two types do not compile.

# Triton compiles a kernel again for integers that are 1 or divisible by 16. These change from call
# to call, or from branch to branch, and a specialised kernel is not faster.
NOT_SPECIALIZED = (
    *("seq_len", "num_heads", "group", "segment_length", "rate", "heads_per_offset"),
    *("cells", "tiles", "slots", "blocks", "seed", "branch"),
)


@triton.jit
def locate_program(order, cells, tiles, REVERSED: tl.constexpr):
    """Segment, tile in it, and outer index (batch row and head) of this program.

    A cell is a pair (segment, tile). Cells vary fastest, so programs that run at one time share
    keys. `order`, an int32 table of `cells` entries, gives another order of cells. REVERSED: the
    last tile of a segment comes first; with causality it has the most keys.
    """
    program = tl.program_id(0)
    cell = program % cells
    outer = program // cells
    if order is not None:
        cell = tl.load(order + cell)
    tile = cell % tiles
    if REVERSED:
        tile = tiles - 1 - tile
    return cell // tiles, tile, outer


@triton.jit
def locate_rows(
    segment, segments, head, seq_len, segment_length, rate, heads_per_offset, BLOCKED: tl.constexpr
):
    """Position of row 0 of a head in a segment (int64), the head's rows, and those of offset 0.

    The rows of offset 0 are counted in a whole segment, whose w is clipped to its sequence.
    `segments` is None, or with packed documents an int64 table `(num_segments, 3)` of start, length
    and clipped w.
    """
    if segments is not None:
        start = tl.load(segments + 3 * segment)
        length = tl.load(segments + 3 * segment + 1)
        clipped = tl.load(segments + 3 * segment + 2)
    else:
        start = segment.to(tl.int64) * segment_length
        length = tl.minimum(seq_len - start, segment_length)
        clipped = tl.cast(segment_length, tl.int64)
    offset = head_offset(head, rate, heads_per_offset, BLOCKED)
    num_rows = _count_rows(length - offset, rate, segment_length)
    return start + offset, num_rows, _count_rows(clipped, rate, segment_length)


@triton.jit
def _count_rows(length, rate, segment_length):
    """Rows among `length` positions (int64) of a segment from the first row on, int32.

    A 64-bit division is a subroutine that spills registers, so this one has 32 bits where w fits.
    """
    last = (tl.maximum(length, 1) - 1).to(segment_length.dtype)
    return tl.where(length > 0, last // rate + 1, 0).to(tl.int32)


@triton.jit
def head_offset(head, rate, heads_per_offset, BLOCKED: tl.constexpr):
    """Offset of a head: see `dilated_core.pattern.branches.head_offset`."""
    if BLOCKED:
        return head // heads_per_offset
    else:
        return head % rate


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
    else:
        return first_of_group + slot, rate, (group - slot + rate - 1) // rate


@triton.jit
def row_zero(base, batch, head, position, batch_stride, row_stride, head_stride):
    """Pointer to row 0 of a head, which is at `position` (int64)."""
    return base + batch * batch_stride + head.to(tl.int64) * head_stride + position * row_stride


@triton.jit
def row_offsets(lane, row_stride, WIDE: tl.constexpr):
    """Distance of rows from the first of their tile: in 32 bits, or in 64 with WIDE.

    In a loop over tiles these offsets stay the same and one pointer moves, so most of the 64-bit
    arithmetic of addresses stays outside the loop.
    """
    if WIDE:
        return lane.to(tl.int64) * row_stride
    else:
        return lane * row_stride.to(tl.int32)


@triton.jit
def row_pointers(base, first, lane, row_stride, dims, WIDE: tl.constexpr):
    """Pointers `(rows, BLOCK_D)` to rows first + lane of one head.

    Args:
        base: Pointer to row 0.
        first: The first row of the tile.
        lane: Rows of the tile, from 0.
        row_stride: Elements from row to row, int64.
        dims: `tl.arange(0, BLOCK_D)`.
        WIDE: See `row_offsets`.
    """
    tile = base + tl.cast(first, tl.int64) * row_stride
    return tile + (row_offsets(lane, row_stride, WIDE)[:, None] + dims[None, :])


@triton.jit
def load_rows(
    base, first, lane, row_stride, inside, dims,
    HEAD_DIM: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Rows of one head: `(rows, BLOCK_D)`, zero beyond HEAD_DIM and, MASKED, where not `inside`.

    Args: As for `row_pointers`, and
        inside: Which of the rows exist.
    """
    pointers = row_pointers(base, first, lane, row_stride, dims, WIDE)
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
