"""Every user error of the attention functions is found and worded here, before any work."""

from __future__ import annotations

import math

import torch

from dilated_core.pattern import DilatedPattern


def check_inputs(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: DilatedPattern
) -> None:
    """Check what users pass to attention.

    Raises:
        TypeError: If an argument is of the wrong type or the tensors' dtypes differ.
        ValueError: If shapes or devices do not fit together.
    """
    if not isinstance(pattern, DilatedPattern):
        raise TypeError(
            f"pattern is a {type(pattern).__name__}; it must be a DilatedPattern, such as "
            f"DilatedPattern([2048, 4096], [1, 2])."
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} is a {type(x).__name__}; it must be a tensor.")
        if x.dim() != 4:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; it must have the four dimensions "
                f"(batch, sequence, heads, head_dim)."
            )
    B, S, H, D = q.shape
    H_kv = k.shape[2]
    if not k.shape == v.shape == (B, S, H_kv, D):
        raise ValueError(
            f"q, k and v have shapes {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            f"dilated attention is self-attention, so they must be equal but for the heads, of "
            f"which k and v may have fewer."
        )
    if H_kv != H and (H_kv == 0 or H % H_kv):
        raise ValueError(
            f"q has {H} heads and k and v have {H_kv}; the heads of k and v must divide those of "
            f"q, so that each serves equally many."
        )
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; they must be equal, so "
            f"convert them with .to(...) first."
        )
    if not q.dtype.is_floating_point:
        raise TypeError(f"q, k and v have dtype {q.dtype}; it must be a floating-point dtype.")
    if not q.device == k.device == v.device:
        raise ValueError(
            f"q, k and v are on {q.device}, {k.device} and {v.device}; they must be on one device."
        )
    if D == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; head_dim must be at least 1.")


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    """`dropout_p` itself, if it is a probability below 1; errors call it `name`.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, (int, float)):
        raise TypeError(f"{name} is {dropout_p!r}; it must be a number.")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{name} is {dropout_p}; it must be at least 0 and below 1.")
    return float(dropout_p)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: `scale` itself, or 1/√head_dim for None.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale is {scale!r}; it must be a number, or None for 1/√head_dim.")
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite.")
    return float(scale)
