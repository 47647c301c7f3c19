"""Checks of the arguments of the attention functions, and the texts of their errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch

from dilated_core.checks import check_integer, check_number, check_tensor


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor | None,
    *,
    is_packed: bool = False,
) -> None:
    """Check what users pass to attention, or with None for v to a function of q and k alone.

    Raises:
        TypeError: If an argument is of the wrong type or the tensors' dtypes differ.
        ValueError: If shapes or devices do not fit together.
    """
    tensors = (q, k) if v is None else (q, k, v)
    for name, x in zip("qkv", tensors, strict=False):
        check_tensor(name, x)
        if x.layout != torch.strided:
            raise TypeError(
                f"{name} has layout {x.layout}; it must be a dense tensor, with padding and "
                f"key_padding_mask or packed with cu_seqlens."
            )
        if x.dim() != (3 if is_packed else 4):
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; with cu_seqlens it must have the three "
                f"dimensions (positions of all documents, heads, head_dim)."
                if is_packed
                else f"{name} has shape {tuple(x.shape)}; it must have the four dimensions "
                f"(batch, sequence, heads, head_dim)."
            )
    *batch_and_sequence, H, D = q.shape
    H_kv = k.shape[-2]
    last = tensors[-1]  # v, or k without v
    names, kv = ("q and k", "k") if v is None else ("q, k and v", "k and v")
    if not k.shape == last.shape == (*batch_and_sequence, H_kv, D):
        raise ValueError(
            f"{names} have shapes {_listed(tuple(x.shape) for x in tensors)}; dilated attention is "
            f"self-attention, so they must be equal but for the heads, of which {kv} may have "
            f"fewer."
        )
    if H_kv != H and (H_kv == 0 or H % H_kv):
        raise ValueError(
            f"q has {H} heads and {kv} {H_kv}; the heads of {kv} must divide those of q, so that "
            f"each serves equally many."
        )
    if not q.dtype == k.dtype == last.dtype:
        raise TypeError(
            f"{names} have dtypes {_listed(x.dtype for x in tensors)}; they must be equal, so "
            f"convert them with .to(...) first."
        )
    # Of one byte, PyTorch has no arithmetic.
    if not q.dtype.is_floating_point or q.dtype.itemsize == 1:
        raise TypeError(
            f"{names} have dtype {q.dtype}; it must be a floating-point dtype of 16 bits or more."
        )
    if not q.device == k.device == last.device:
        raise ValueError(
            f"{names} are on {_listed(x.device for x in tensors)}; they must be on one device."
        )
    if D == 0:
        raise ValueError(f"q has shape {tuple(q.shape)}; head_dim must be at least 1.")


def cast_for_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors as autocast casts them, if a region of autocast is around the call.

    The device is that of the first. float64 and integers stay, as in PyTorch's operators, and so
    does what is no tensor, for checks to refuse.
    """
    first = tensors[0]
    if not isinstance(first, torch.Tensor):
        return list(tensors)
    kind = first.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [
        x.to(dtype)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.float64
        else x
        for x in tensors
    ]


def _listed(values: Iterable[object]) -> str:
    """Two values or more as `a, b and c`."""
    *others, last = map(str, values)
    return f"{', '.join(others)} and {last}"


def check_dropout(dropout_p: float, name: str = "dropout_p") -> float:
    """`dropout_p` itself, if it is a probability below 1; errors call it `name`.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.
    """
    return check_number(name, dropout_p, at_least=0, below=1)


def check_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: `scale` itself, or 1/√head_dim for None.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is not finite.
    """
    if scale is None:
        return 1 / math.sqrt(head_dim)
    return check_number("scale", scale, fix=", or None for 1/√head_dim")


def check_key_padding_mask(mask: torch.Tensor, q: torch.Tensor) -> None:
    """Check a mask of the keys of q `(B, S, H, D)`.

    Raises:
        TypeError: If it is no bool tensor.
        ValueError: If its shape or device does not fit.
    """
    check_tensor("key_padding_mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(
            f"key_padding_mask has dtype {mask.dtype}; it must be bool, True for keys to ignore."
        )
    if mask.shape != q.shape[:2]:
        raise ValueError(
            f"key_padding_mask has shape {tuple(mask.shape)} and q {tuple(q.shape)}; it must be "
            f"(batch, sequence)."
        )
    if mask.device != q.device:
        raise ValueError(
            f"key_padding_mask is on {mask.device} and q on {q.device}; they must be on one device."
        )


def check_cu_seqlens(cu_seqlens: torch.Tensor) -> None:
    """Check what can be known of `cu_seqlens` without reading its values.

    Raises:
        TypeError: If it is no int32 or int64 tensor.
        ValueError: If it does not have one dimension and two entries.
    """
    if not isinstance(cu_seqlens, torch.Tensor):
        raise TypeError(
            f"cu_seqlens is a {type(cu_seqlens).__name__}; it must be an int32 or int64 tensor, "
            f"such as torch.tensor([0, 100, 250]) for documents of 100 and 150 positions."
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it must be int32 or int64.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must have one dimension, with an "
            f"entry where each document begins and one where the last one ends."
        )


def read_document_bounds(
    cu_seqlens: torch.Tensor, num_positions: int, owner: str = "q"
) -> torch.Tensor:
    """`cu_seqlens` as int64 on the CPU, checked.

    Args:
        cu_seqlens: Of a tensor that `check_cu_seqlens` has let pass.
        num_positions: Of all documents together.
        owner: What has these positions, for errors.

    Raises:
        ValueError: If they do not go from 0 to `num_positions` without ever decreasing.
    """
    if cu_seqlens.is_meta:
        raise ValueError("cu_seqlens is on meta and holds no values; give it on the CPU.")
    bounds = cu_seqlens.detach().to("cpu", torch.int64)
    first, last = int(bounds[0]), int(bounds[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens starts at {first}; the first document begins at 0.")
    if (falls := (bounds.diff() < 0).nonzero()).numel():
        i = int(falls[0])
        raise ValueError(
            f"cu_seqlens goes from {int(bounds[i])} to {int(bounds[i + 1])} at entry {i + 1}; it "
            f"must not decrease, as each document ends where the next one begins."
        )
    if last != num_positions:
        raise ValueError(
            f"cu_seqlens ends at {last} and {owner} has {num_positions} positions; the last "
            f"document must end where {owner} does."
        )
    return bounds


def document_bounds(cu_seqlens: torch.Tensor, num_positions: int) -> list[int]:
    """`read_document_bounds` as a list."""
    return cast("list[int]", read_document_bounds(cu_seqlens, num_positions).tolist())


def check_backend_name(backend: object) -> None:
    """Refuse what is no name of a backend.

    Raises:
        TypeError: If it is not a string.
    """
    if not isinstance(backend, str):
        raise TypeError(
            f"backend is {backend!r}; it must be 'auto' or the name of one of "
            f"dilated_core.available_backends()."
        )


def check_max_workspace_bytes(value: int | None) -> None:
    """Check a limit of the workspace.

    Raises:
        TypeError: If it is neither None nor an integer.
        ValueError: If it is below 1.
    """
    if value is not None:
        check_integer("max_workspace_bytes", value, at_least=1)
