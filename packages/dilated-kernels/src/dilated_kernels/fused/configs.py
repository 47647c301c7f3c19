"""Tile sizes, warps and pipeline stages of each kernel."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import triton

Kind = Literal["forward", "dq", "dk_dv"]


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


def block_d(head_dim: int) -> int:
    """head_dim rounded up to what a tile can have."""
    # 16 is the least that a matrix product takes.
    return max(16, triton.next_power_of_2(head_dim))


def tabled_config(
    kind: Kind, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], precision: str
) -> Config:
    return Config(64, 64, 4, 2)


def choose_config(
    kind: Kind, dtype: torch.dtype, head_dim: int, device: torch.device, max_rows: int
) -> Config:
    config = Config(64, 64, 4, 2)
    longest = max(16, triton.next_power_of_2(max_rows))
    return config._replace(
        block_m=min(config.block_m, longest), block_n=min(config.block_n, longest)
    )
