"""Tile sizes, warps and pipeline stages of each kernel, by GPU generation.

Each entry of the table is among the largest tiles that fit the registers and the shared memory of
such a GPU, causal or not, with no spill and no product that waits for another.
`tools/kernel_resources.py` compiles the entries and records what they use. For 8.x in half
precision the tiles of PyTorch's FlexAttention were tried first. No entry has been timed on a GPU.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton

from dilated_kernels.fused.tuning import Config, Kind, Tuning

Arithmetic = Literal["half", "tf32", "ieee"]
Generation = Literal["ampere", "ada", "hopper", "blackwell"]

SHARED_BYTES: dict[Generation, int] = {
    "ampere": 166912,
    "ada": 101376,
    "hopper": 232448,
    "blackwell": 232448,
}
"""Shared memory that a program may use."""

TENSOR_COLUMNS = 512
"""Columns of tensor memory that a program may use on "blackwell"."""


HEAD_DIMS = (16, 32, 64, 128, 256)
"""The columns of the table: head_dim, rounded up."""


_Tiles = tuple[int, int, int, int]
_Row = tuple[_Tiles, ...]

# fmt: off
TABLE: dict[tuple[Generation, Arithmetic, Kind], tuple[_Row, _Row]] = {
    ("ampere", "half", "forward"): (
        ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 2), (64, 64, 8, 3), (64, 64, 8, 2)),
        ((128, 32, 4, 3), (128, 32, 4, 3), (128, 32, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2)),
    ),
    ("ampere", "half", "dq"): (
        ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
        ((128, 32, 4, 3), (128, 32, 4, 3), (128, 32, 8, 3), (64, 32, 8, 2), (32, 32, 4, 2)),
    ),
    ("ampere", "half", "dk_dv"): (
        ((64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2)),
        ((32, 128, 8, 3), (32, 128, 8, 3), (16, 128, 8, 2), (32, 64, 8, 2), (16, 64, 8, 2)),
    ),
    ("ampere", "tf32", "forward"): (
        ((128, 64, 8, 2), (128, 32, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 2)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2), (32, 16, 8, 2)),
    ),
    ("ampere", "tf32", "dq"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2), (64, 32, 8, 2), (32, 16, 8, 2)),
    ),
    ("ampere", "tf32", "dk_dv"): (
        ((64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2)),
        ((32, 64, 8, 2), (32, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 8, 2)),
    ),
    ("ampere", "ieee", "forward"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 3), (32, 16, 4, 2), (32, 16, 16, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (32, 16, 8, 3), (32, 16, 16, 3)),
    ),
    ("ampere", "ieee", "dq"): (
        ((64, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 16, 2), (32, 16, 4, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (32, 16, 4, 2), (32, 16, 16, 3), (32, 16, 4, 3)),
    ),
    ("ampere", "ieee", "dk_dv"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 16, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 3), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 16, 2)),
    ),
    ("ada", "half", "forward"): (
        ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 2)),
        ((128, 32, 4, 2), (128, 32, 8, 3), (128, 32, 8, 2), (128, 32, 8, 2), (64, 16, 8, 2)),
    ),
    ("ada", "half", "dq"): (
        ((128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (32, 64, 8, 2), (32, 32, 4, 2)),
        ((128, 32, 4, 3), (128, 32, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2), (32, 16, 4, 3)),
    ),
    ("ada", "half", "dk_dv"): (
        ((64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
        ((32, 128, 8, 3), (32, 128, 8, 3), (16, 128, 8, 2), (32, 64, 8, 2), (16, 32, 4, 2)),
    ),
    ("ada", "tf32", "forward"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 16, 4, 2), (32, 32, 8, 1)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 16, 4, 2), (32, 16, 8, 1)),
    ),
    ("ada", "tf32", "dq"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1), (32, 16, 8, 1)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (128, 16, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1)),
    ),
    ("ada", "tf32", "dk_dv"): (
        ((64, 64, 8, 2), (64, 32, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2), (16, 16, 4, 2)),
        ((32, 64, 8, 2), (32, 32, 4, 2), (64, 32, 8, 2), (16, 32, 4, 2), (16, 16, 4, 3)),
    ),
    ("ada", "ieee", "forward"): (
        ((64, 32, 8, 3), (64, 32, 8, 3), (64, 32, 8, 2), (32, 16, 8, 2), (32, 16, 8, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2), (16, 16, 8, 2)),
    ),
    ("ada", "ieee", "dq"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 16, 4, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2), (32, 16, 4, 1)),
    ),
    ("ada", "ieee", "dk_dv"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 4, 1)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2), (16, 32, 4, 2), (16, 16, 4, 1)),
    ),
    ("hopper", "half", "forward"): (
        ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 2), (64, 16, 8, 2)),
    ),
    ("hopper", "half", "dq"): (
        ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (32, 32, 4, 2)),
        ((128, 64, 8, 3), (128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3), (32, 16, 4, 2)),
    ),
    ("hopper", "half", "dk_dv"): (
        ((64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3), (32, 32, 8, 2)),
        ((32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (16, 128, 8, 3), (16, 32, 8, 2)),
    ),
    ("hopper", "tf32", "forward"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 16, 4, 2), (32, 32, 8, 2)),
    ),
    ("hopper", "tf32", "dq"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 1)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (32, 32, 8, 1)),
    ),
    ("hopper", "tf32", "dk_dv"): (
        ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (128, 32, 8, 3), (32, 32, 8, 1)),
        ((32, 64, 4, 2), (32, 64, 4, 2), (16, 64, 4, 2), (64, 32, 8, 2), (16, 32, 8, 1)),
    ),
    ("hopper", "ieee", "forward"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 32, 16, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2), (32, 16, 16, 2)),
    ),
    ("hopper", "ieee", "dq"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2), (32, 32, 16, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 16, 2), (16, 16, 4, 2), (32, 16, 16, 2)),
    ),
    ("hopper", "ieee", "dk_dv"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 16, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 3), (16, 32, 8, 2), (16, 32, 16, 2)),
    ),
    ("blackwell", "half", "forward"): (
        ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        ((64, 64, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2)),
    ),
    ("blackwell", "half", "dq"): (
        ((128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2)),
        ((128, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2), (128, 32, 8, 3), (64, 32, 8, 2)),
    ),
    ("blackwell", "half", "dk_dv"): (
        ((64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (32, 64, 8, 2)),
        ((32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (32, 128, 8, 3), (16, 64, 8, 2)),
    ),
    ("blackwell", "tf32", "forward"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2)),
        ((128, 32, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)),
    ),
    ("blackwell", "tf32", "dq"): (
        ((128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
        ((128, 32, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
    ),
    ("blackwell", "tf32", "dk_dv"): (
        ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
        ((64, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 1), (16, 32, 8, 1)),
    ),
    ("blackwell", "ieee", "forward"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 32, 16, 2)),
        ((64, 16, 8, 2), (64, 16, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2), (32, 16, 16, 2)),
    ),
    ("blackwell", "ieee", "dq"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2), (32, 32, 16, 2)),
        ((64, 16, 8, 2), (64, 16, 4, 2), (64, 16, 8, 2), (16, 16, 4, 2), (32, 16, 16, 2)),
    ),
    ("blackwell", "ieee", "dk_dv"): (
        ((64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 16, 2)),
        ((32, 32, 8, 2), (32, 32, 8, 2), (16, 32, 4, 2), (16, 32, 8, 2), (16, 32, 16, 2)),
    ),
}
# fmt: on
"""Two lines for each kernel: without, and with a key padding mask or dropout.

A mask or dropout needs registers in the inner loop, so the inner tile is halved in most entries.
"""

PADDED: dict[tuple[Generation, Arithmetic, Kind, bool, int], _Tiles] = {
    ("ampere", "half", "dq", True, 64): (128, 16, 8, 3),
    ("ada", "half", "dq", True, 64): (128, 16, 8, 3),
    ("ada", "ieee", "dk_dv", True, 64): (16, 32, 4, 2),
    ("ada", "ieee", "forward", True, 64): (64, 16, 4, 2),
    ("ada", "ieee", "forward", True, 128): (32, 16, 8, 3),
    ("ada", "tf32", "forward", False, 128): (64, 32, 4, 2),
    ("hopper", "ieee", "forward", True, 128): (32, 16, 16, 2),
    ("blackwell", "half", "dq", False, 64): (128, 64, 8, 2),
    ("blackwell", "half", "forward", False, 64): (128, 128, 8, 4),
}
"""Other tiles for a head_dim between the columns, whose loads need a mask.

The last two keys: whether there is a key padding mask or dropout, and the head_dim, rounded up.
"""


def block_d(head_dim: int) -> int:
    """head_dim rounded up to a size of a tile."""
    return max(HEAD_DIMS[0], triton.next_power_of_2(head_dim))


def generation(capability: tuple[int, int]) -> Generation:
    """The part of the table for a compute capability.

    9.x multiplies by warp groups. 10.x and 11.x have tensor memory. All others, the consumer GPUs
    of 12.x included, multiply by warps; 8.0 and 8.7 have more shared memory than the rest of them.
    """
    if capability[0] == 9:
        return "hopper"
    if capability[0] in (10, 11):
        return "blackwell"
    return "ampere" if capability in ((8, 0), (8, 7)) else "ada"


def tabled_config(
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    precision: str,
    extras: bool = False,
) -> Config:
    """The line of the table for a kernel.

    Args:
        kind: Which kernel.
        dtype: Of q, k and v.
        head_dim: D, at most 256.
        capability: CUDA compute capability.
        precision: Of float32 products: "tf32" or another one. Ignored for other dtypes.
        extras: With a key padding mask or dropout.
    """
    if dtype != torch.float32:
        arithmetic: Arithmetic = "half"
    else:
        arithmetic = "tf32" if precision == "tf32" else "ieee"
    line = (generation(capability), arithmetic, kind)
    width = block_d(head_dim)
    tiles = TABLE[line][extras][HEAD_DIMS.index(width)]
    if head_dim != width:
        tiles = PADDED.get((*line, extras, width), tiles)
    return Config(*tiles)


def choose_config(
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    tuning: Tuning,
    max_rows: int,
    extras: bool = False,
) -> Config:
    """The configuration for a launch, with tiles no longer than a segment.

    Args:
        kind, dtype, head_dim, extras: As for `tabled_config`.
        tuning: Its config for this kernel, if it has one, replaces the table's.
        max_rows: The most rows of a head in a segment.
    """
    config = tuning.configs.get(kind) or tabled_config(
        kind, dtype, head_dim, tuning.capability, tuning.precision, extras
    )
    longest = max(16, triton.next_power_of_2(max_rows))
    return config._replace(
        block_m=min(config.block_m, longest), block_n=min(config.block_n, longest)
    )
