"""How positions enter q and k: turned by RoPE or xPos, or widened by ALiBi's digits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from dilated_core.positions.alibi import with_alibi
from dilated_core.positions.rotary import Rotation, rotate
from torch import Tensor

# Positions that ALiBi's digits can hold, see `dilated_core.positions.alibi.with_alibi`.
ALIBI_POSITIONS = 2**24


class AlibiPositions(NamedTuple):
    """Where rows stand, for ALiBi (arXiv 2108.12409).

    Attributes:
        positions: `(S,)`, or `(B, S)` if sequences differ; int64, from 0 on.
    """

    positions: Tensor


PositionCode = Rotation | AlibiPositions


def encode_positions(
    q: Tensor, k: Tensor, v: Tensor, code: PositionCode | None
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v from whose scores attention sees the distance of positions.

    Args:
        q: `(B, S, H, D)`, or packed `(T, H, D)`.
        k, v: Likewise, with H_kv heads.
        code: None leaves all as they are.

    Returns:
        The same shapes; with ALiBi `alibi_head_dim` channels, for a scale of 1/√D. The result is
        in the first D channels of what attention returns.
    """
    if code is None:
        return q, k, v
    if isinstance(code, Rotation):
        return rotate(q, code.q_cos, code.q_sin), rotate(k, code.k_cos, code.k_sin), v
    # Each row on its own, so rows of all sequences may follow one another.
    rows_q, rows_k, rows_v = (x.reshape(1, -1, *x.shape[-2:]) for x in (q, k, v))
    positions = code.positions
    if q.dim() == 4 and positions.dim() == 1:
        positions = positions.expand(len(q), -1)
    wide = with_alibi(rows_q, rows_k, rows_v, positions.reshape(-1))
    encoded_q, encoded_k, encoded_v = (
        x.view(*given.shape[:-1], -1)
        for x, given in zip((wide.q, wide.k, wide.v), (q, k, v), strict=True)
    )
    return encoded_q, encoded_k, encoded_v


def alibi_head_dim(head_dim: int, dtype: torch.dtype) -> int:
    """Channels of a head with ALiBi's digits in this dtype."""
    none = torch.empty(1, 0, 1, head_dim, dtype=dtype, device="cpu")
    positions = torch.empty(0, dtype=torch.int64, device="cpu")
    return with_alibi(none, none, none, positions).q.shape[-1]
