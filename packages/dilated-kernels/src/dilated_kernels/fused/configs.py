"""Tile sizes, warps and pipeline stages of each kernel, by GPU generation.

Each line of the table is the first of a list of candidates, larger tiles first, that the compiler
fits into the registers and the shared memory of such a GPU, causal or not: with no spill inside a
loop and no product that waits for another; `tools/kernel_resources.py` compiles them and records
what they use (docs/kernels.md). For 8.x in half precision the list begins with the tiles of
PyTorch's FlexAttention. None has been timed on a GPU yet.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton

Kind = Literal["forward", "dq", "dk_dv"]
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


class Config(NamedTuple):
    """How a kernel is cut and compiled.

    Attributes:
        block_m: Queries per tile.
        block_n: Keys per tile.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


HEAD_DIMS = (16, 32, 64, 128, 256)
"""What head_dim is rounded up to; the columns of the table."""


def _row(*columns: tuple[int, int, int, int]) -> tuple[Config, ...]:
    return tuple(Config(*column) for column in columns)


# fmt: off
TABLE: dict[tuple[Generation, Arithmetic, Kind], tuple[Config, ...]] = {
    ("ampere", "half", "forward"): _row(
        (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2),
    ),
    ("ampere", "half", "dq"): _row(
        (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 64, 8, 2), (64, 64, 8, 2),
    ),
    ("ampere", "half", "dk_dv"): _row(
        (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 2),
    ),
    ("ampere", "tf32", "forward"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2),
    ),
    ("ampere", "tf32", "dq"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2),
    ),
    ("ampere", "tf32", "dk_dv"): _row(
        (64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 8, 2), (32, 32, 8, 2),
    ),
    ("ampere", "ieee", "forward"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 16, 2),
    ),
    ("ampere", "ieee", "dq"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 16, 2), (32, 16, 4, 2),
    ),
    ("ampere", "ieee", "dk_dv"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 16, 2),
    ),
    ("ada", "half", "forward"): _row(
        (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 2), (64, 32, 8, 2),
    ),
    ("ada", "half", "dq"): _row(
        (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2), (32, 32, 4, 2),
    ),
    ("ada", "half", "dk_dv"): _row(
        (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2),
    ),
    ("ada", "tf32", "forward"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 32, 8, 1),
    ),
    ("ada", "tf32", "dq"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 8, 1), (32, 16, 8, 1),
    ),
    ("ada", "tf32", "dk_dv"): _row(
        (64, 64, 8, 2), (64, 32, 4, 2), (128, 32, 8, 2), (32, 32, 4, 2), (16, 16, 4, 2),
    ),
    ("ada", "ieee", "forward"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2),
    ),
    ("ada", "ieee", "dq"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 16, 4, 2),
    ),
    ("ada", "ieee", "dk_dv"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 4, 1),
    ),
    ("hopper", "half", "forward"): _row(
        (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 2), (64, 32, 4, 2),
    ),
    ("hopper", "half", "dq"): _row(
        (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (32, 32, 4, 2),
    ),
    ("hopper", "half", "dk_dv"): _row(
        (64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3), (32, 32, 8, 2),
    ),
    ("hopper", "tf32", "forward"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 4, 2), (32, 64, 8, 2),
    ),
    ("hopper", "tf32", "dq"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 1),
    ),
    ("hopper", "tf32", "dk_dv"): _row(
        (64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 2), (128, 32, 8, 2), (32, 32, 8, 1),
    ),
    ("hopper", "ieee", "forward"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 32, 16, 2),
    ),
    ("hopper", "ieee", "dq"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2), (32, 32, 16, 2),
    ),
    ("hopper", "ieee", "dk_dv"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 16, 2),
    ),
    ("blackwell", "half", "forward"): _row(
        (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2),
    ),
    ("blackwell", "half", "dq"): _row(
        (128, 128, 8, 3), (128, 128, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 64, 8, 2),
    ),
    ("blackwell", "half", "dk_dv"): _row(
        (64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (32, 64, 8, 2),
    ),
    ("blackwell", "tf32", "forward"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2),
    ),
    ("blackwell", "tf32", "dq"): _row(
        (128, 64, 8, 2), (128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1),
    ),
    ("blackwell", "tf32", "dk_dv"): _row(
        (128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1),
    ),
    ("blackwell", "ieee", "forward"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 16, 2), (32, 32, 16, 2),
    ),
    ("blackwell", "ieee", "dq"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 32, 4, 2), (32, 32, 16, 2),
    ),
    ("blackwell", "ieee", "dk_dv"): _row(
        (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 16, 2),
    ),
}
# fmt: on

PADDED: dict[tuple[Generation, Arithmetic, Kind, int, bool], Config] = {
    ("hopper", "tf32", "dk_dv", 128, False): Config(64, 32, 8, 2),
}
"""Where the mask that a head_dim between the columns needs makes the table's line spill.

By what the head_dim is rounded up to, and by whether there is a key padding mask or dropout.
"""

EXTRAS: dict[tuple[Generation, Arithmetic, Kind, int], Config] = {
    ("ampere", "half", "forward", 64): Config(128, 32, 8, 2),
    ("ada", "half", "forward", 64): Config(128, 32, 8, 2),
    ("ampere", "tf32", "forward", 128): Config(64, 32, 8, 2),
    ("hopper", "ieee", "dq", 64): Config(64, 16, 16, 2),
    # Half the tile does not spill with Triton 3.9; with 3.6 it does.
    ("hopper", "half", "dq", 64): Config(128, 32, 8, 3),
    ("blackwell", "half", "forward", 64): Config(64, 64, 8, 2),
    ("blackwell", "half", "dq", 64): Config(64, 64, 8, 2),
    ("ampere", "tf32", "dk_dv", 128): Config(64, 32, 8, 2),
    ("blackwell", "tf32", "dq", 128): Config(64, 32, 8, 1),
    ("blackwell", "half", "dq", 32): Config(128, 32, 8, 3),
    ("blackwell", "tf32", "dq", 32): Config(64, 64, 8, 2),
    ("ampere", "half", "dq", 256): Config(32, 32, 4, 2),
    ("ada", "ieee", "dq", 256): Config(32, 16, 4, 1),
    ("blackwell", "half", "dq", 16): Config(128, 32, 8, 3),
    ("blackwell", "half", "forward", 16): Config(64, 64, 4, 3),
}
"""Where half the tile spills with a mask or dropout, by head_dim rounded up."""


def block_d(head_dim: int) -> int:
    """head_dim rounded up to what a tile can have."""
    return max(HEAD_DIMS[0], triton.next_power_of_2(head_dim))


def generation(capability: tuple[int, int]) -> Generation:
    """The part of the table for a compute capability.

    9.x multiplies by warp groups; 10.x and 11.x have tensor memory; all others, which includes the
    consumer GPUs of 12.x, multiply by warps. Of those, 8.0 and 8.7 have more shared memory.
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
        precision: Of float32 products, "tf32" or else; no matter for other dtypes.
        extras: With a key padding mask or dropout. They take registers in the loop, so the tiles
            that it walks over are half as large.
    """
    if dtype != torch.float32:
        arithmetic: Arithmetic = "half"
    else:
        arithmetic = "tf32" if precision == "tf32" else "ieee"
    line = (generation(capability), arithmetic, kind)
    width = block_d(head_dim)
    config = TABLE[line][HEAD_DIMS.index(width)]
    if extras:
        config = EXTRAS.get((*line, width)) or _halved(kind, config)
    return config if head_dim == width else PADDED.get((*line, width, extras), config)


def _halved(kind: Kind, config: Config) -> Config:
    if kind == "dk_dv":
        return config._replace(block_m=max(16, config.block_m // 2))
    return config._replace(block_n=max(16, config.block_n // 2))


def choose_config(
    kind: Kind,
    dtype: torch.dtype,
    head_dim: int,
    device: torch.device,
    max_rows: int,
    precision: str,
    extras: bool = False,
) -> Config:
    """The configuration for a launch: that of the table, with tiles no larger than a segment.

    Args:
        kind, dtype, head_dim, precision, extras: As for `tabled_config`.
        device: Where it runs; a CPU is treated as a GPU of compute capability 8.0.
        max_rows: The most rows of a head in a segment.
    """
    config = tabled_config(kind, dtype, head_dim, _capability(device), precision, extras)
    longest = max(16, triton.next_power_of_2(max_rows))
    return config._replace(
        block_m=min(config.block_m, longest), block_n=min(config.block_n, longest)
    )


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
