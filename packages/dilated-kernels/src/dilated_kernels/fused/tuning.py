"""How the kernels of a call are cut and compiled.

These values change the speed, and of the results only the rounding. This module imports no Triton,
so the backend can check what a user passes before it loads any kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from dilated_kernels.fused.tile_order import TileOrder

Kind = Literal["forward", "dq", "dk_dv"]
"""The kernels whose tiles are chosen."""


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


class Tuning(NamedTuple):
    """What decides, beside the call itself, how its kernels are compiled.

    Attributes:
        capability: CUDA compute capability of the GPU that runs them.
        precision: Of float32 products: see `dilated_kernels.fused.arithmetic.dot`.
        tile_order: The order in which the tiles of a launch start.
        configs: Tiles, warps and stages of a kernel; the table's for kernels that are not in it.
        is_wide: Whether rows of a tile have 64-bit offsets even where 32 bits suffice.
    """

    capability: tuple[int, int]
    precision: str
    tile_order: TileOrder = "row_major"
    configs: Mapping[Kind, Config] = {}
    is_wide: bool = False


def check_configs(configs: Mapping[Kind, Config]) -> dict[Kind, Config]:
    """The configs as `Config`, checked.

    Raises:
        ValueError: If a name is no kernel's, or a size is one that no kernel can have.
    """
    checked: dict[Kind, Config] = {}
    for kind, values in configs.items():
        if kind not in get_args(Kind):
            names = ", ".join(map(repr, get_args(Kind)))
            raise ValueError(f"configs has {kind!r}; kernels with a config are {names}.")
        config = Config(*values)
        for name, value, least in zip(Config._fields, config, (16, 16, 1, 1), strict=True):
            # num_stages is a depth; the other sizes are counted in powers of two by Triton.
            if value < least or (name != "num_stages" and value & (value - 1)):
                raise ValueError(
                    f"{name} of {kind!r} is {value}; it must be at least {least}"
                    f"{'' if name == 'num_stages' else ' and a power of two'}."
                )
        checked[kind] = config
    return checked
