"""Arithmetic that all kernels share: matrix products, and dropout by position."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """`a @ b` in float32.

    PRECISION is the `input_precision` of `tl.dot`, which matters for float32 operands. "upcast"
    converts the operands first, for the interpreter, whose bfloat16 products are wrong.
    """
    if PRECISION == "upcast":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def keep_factor(seed, branch, sequence, first_position, rate, query, key, dropout_p):
    """1/(1 − p) where a probability is kept, and 0 where it is dropped.

    A function of positions, so tiles, launches and directions make no difference. The Philox
    counter has four words: the position of the key, that of the query, batch · H + head, and the
    branch, because a key that two branches select has two probabilities. Seven rounds are the
    fewest that pass every test of randomness (Salmon et al. 2011, table 2).

    Args:
        seed: 64 bits.
        branch: Index of the branch.
        sequence: batch · H + head.
        first_position, rate: Position of row 0, and positions from one row to the next.
        query, key: Rows, int32 of shapes that broadcast.
        dropout_p: Probability of dropping.
    """
    query, key = tl.broadcast(query, key)
    first = first_position.to(tl.int32)
    query = first + query * rate
    key = first + key * rate
    bits, _, _, _ = tl.philox(seed, key, query, query * 0 + sequence, query * 0 + branch, 7)
    # A float32 holds 24 bits exactly.
    uniform = (bits >> 8).to(tl.float32) * (1.0 / 16777216.0)
    return tl.where(uniform >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)
