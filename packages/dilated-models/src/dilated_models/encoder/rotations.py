"""How an encoder turns queries and keys: once per call, for all of its layers."""

from __future__ import annotations

import torch
from dilated_core.positions.rotary import Rotation, check_decay_range, rotation_at
from torch import Tensor

from dilated_models.encoder.config import EncoderConfig
from dilated_models.layers.documents import Documents


def rotation_of(config: EncoderConfig, x: Tensor, cu_seqlens: Tensor | None) -> Rotation | None:
    """The rotation of the rows of `x`, or None without positions.

    Args:
        config: Of the encoder.
        x: `(B, S, d_model)`; `(T, d_model)` with `cu_seqlens`.
        cu_seqlens: Where sequences begin that are packed in `x`; positions count from there.

    Raises:
        ValueError: If xPos would leave the range of the dtype of queries and keys.
    """
    if config.positions == "none":
        return None
    longest = x.shape[-2]
    positions = torch.arange(longest, device=x.device)
    if cu_seqlens is not None:
        positions = Documents.of(cu_seqlens.to(x.device), positions).positions
        longest = 0 if cu_seqlens.is_meta else int(cu_seqlens.diff().max())
    scale_base = config.xpos_scale_base if config.positions == "xpos" else None
    center = (longest + 1) // 2
    if scale_base is not None:
        kind = x.device.type
        is_half = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        check_decay_range(
            center, scale_base, torch.get_autocast_dtype(kind) if is_half else x.dtype
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return rotation_at(
        positions, config.head_dim, scale_base=scale_base, center=center, dtype=dtype
    )
