"""Partial attention results merge by their lse: over branches, shards, cache pieces, zero keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dilated_core.checks import check_tensor


class AttentionOutput(NamedTuple):
    """An attention result and the log of its softmax denominators.

    Attributes:
        out: `(B, S, H, D)`, in the dtype of the inputs; 0 where a query sees no key.
        lse: `(B, S, H)`, natural logarithm, float32 (float64 for float64 inputs); −inf where a
            query sees no key.
    """

    out: torch.Tensor
    lse: torch.Tensor


def merge_partials(partials: Sequence[AttentionOutput]) -> AttentionOutput:
    """Combine attentions of the same queries over different keys into the attention over all.

    lse = log Σ exp(lse_i) and out = Σ exp(lse_i − lse) · out_i: the mixing by softmax denominators
    of the paper (arXiv 2307.02486, eq. 10). Differentiable through `out` and `lse` both.

    Args:
        partials: Results of equal shapes, `out` `(…, D)` of one dtype and `lse` `(…)`. A partial
            whose query sees no key has lse −inf and adds nothing, whatever its `out` holds there.

    Returns:
        The merged result, computed in the widest dtype of the partials, at least float32. `out`
        has the dtype of the partials, and is 0 with lse −inf where every partial is empty. A row
        is NaN where a partial has a NaN or an lse of +inf; other rows are not affected.

    Raises:
        TypeError: If one is no AttentionOutput of tensors, the dtypes of `out` differ, or a dtype
            is not floating.
        ValueError: If there is no partial, or their shapes or devices differ.

    Example:
        >>> a = AttentionOutput(torch.tensor([1.0]), torch.tensor(0.0))
        >>> b = AttentionOutput(torch.tensor([4.0]), torch.tensor(2.0).log())  # twice the weight
        >>> merge_partials([a, b]).out
        tensor([3.])
    """
    for p in partials:
        if not isinstance(p, AttentionOutput):
            raise TypeError(
                f"partials holds a {type(p).__name__}; each must be an AttentionOutput(out, lse)."
            )
        check_tensor("out of a partial", p.out)
        check_tensor("lse of a partial", p.lse)
    if not partials:
        raise ValueError("partials is empty; merging needs at least one attention result.")
    shapes = {(tuple(p.out.shape), tuple(p.lse.shape)) for p in partials}
    if len(shapes) > 1 or partials[0].lse.shape != partials[0].out.shape[:-1]:
        raise ValueError(
            f"partials have (out, lse) shapes {sorted(shapes)}; they must be equal, and lse must "
            f"have the shape of out without its last dimension."
        )
    devices = {str(x.device) for p in partials for x in p}
    if len(devices) > 1:
        raise ValueError(
            f"partials are on {' and '.join(sorted(devices))}; they must be on one device."
        )
    dtype = partials[0].out.dtype
    if any(p.out.dtype != dtype for p in partials):
        raise TypeError(
            f"partials have out of dtypes {[str(p.out.dtype) for p in partials]}; they must be "
            f"equal, so convert them with .to(...) first."
        )
    wide = accumulation_dtype(dtype)
    for p in partials:
        if not (dtype.is_floating_point and p.lse.dtype.is_floating_point):
            raise TypeError(
                f"partials have out of dtype {dtype} and lse of dtype {p.lse.dtype}; both must be "
                f"floating-point dtypes."
            )
        wide = torch.promote_types(wide, p.lse.dtype)
    lses = torch.stack([p.lse.to(wide) for p in partials])
    # Shifting by a finite maximum keeps −inf − −inf from ever being formed, also in backward.
    largest = lses.detach().amax(0)
    largest = largest.masked_fill(largest == -math.inf, 0)
    weights = (lses - largest).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    # Divided before they are mixed, so that the mixture of finite outs cannot overflow.
    weights = weights / total
    mixed = torch.zeros_like(partials[0].out, dtype=wide)
    for weight, p in zip(weights, partials, strict=True):
        # A weight of 0 does not hide a NaN: 0 · NaN is NaN.
        out = p.out.to(wide).masked_fill((p.lse == -math.inf).unsqueeze(-1), 0)
        mixed = mixed + weight.unsqueeze(-1) * out
    lse = (largest + total.log()).masked_fill(empty, -math.inf)
    return AttentionOutput(mixed.to(dtype), lse)


def fold_(into: AttentionOutput, partial: AttentionOutput) -> None:
    """Merge `partial` into `into`, in place: `merge_partials` of the two.

    Args:
        into: `out` `(…, D)` and `lse` `(…)` in `accumulation_dtype`, any strides. A row that holds
            nothing yet has lse −inf and out 0, see `empty_partial`.
        partial: Of the same shapes. A row whose lse is −inf adds nothing; its out must be finite.

    Example:
        >>> a = AttentionOutput(torch.tensor([1.0]), torch.tensor(0.0))
        >>> fold_(a, AttentionOutput(torch.tensor([4.0]), torch.tensor(2.0).log()))
        >>> a.out
        tensor([3.])
    """
    out, lse = partial
    if lse.dtype != into.lse.dtype:
        lse = lse.to(into.lse.dtype)
    if out.dtype != into.out.dtype:
        out = out.to(into.out.dtype)
    into.out.lerp_(out, fold_lse_(into.lse, lse).unsqueeze(-1))


def fold_lse_(lse: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    """In place, lse becomes logaddexp(lse, partial_lse); returns the weight exp(partial − merged).

    With that weight, `out.lerp_(partial_out, weight)` is the merged output.

    Args:
        lse: float32 or float64, any shape; −inf where nothing has been folded yet.
        partial_lse: Same shape and dtype; −inf where the partial is empty, which has weight 0.

    Returns:
        The weight, in that dtype.
    """
    # −inf − −inf would be NaN, for a row that is empty so far and in the partial. A NaN of either
    # lse stays a NaN.
    weight = (partial_lse - lse.clamp_min(torch.finfo(lse.dtype).min)).sigmoid_()
    torch.logaddexp(lse, partial_lse, out=lse)
    return weight


def empty_partial(
    shape: Sequence[int], *, dtype: torch.dtype, device: torch.device | str
) -> AttentionOutput:
    """The result over no key at all, to fold others into: out 0 and lse −inf.

    Args:
        shape: Of out.
        dtype: Of the inputs; out and lse have its `accumulation_dtype`.
        device: Of the tensors.
    """
    wide = accumulation_dtype(dtype)
    return AttentionOutput(
        torch.zeros(*shape, dtype=wide, device=device),
        torch.full(tuple(shape[:-1]), -math.inf, dtype=wide, device=device),
    )


def lse_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which lse is merged: float64, where the device has it.

    At an lse of 100 000 float32 has a spacing of 0.008, and weights exp(lse_i − lse) would be wrong
    by as much. MPS has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64


def zero_key_partial(count: int, like: AttentionOutput) -> AttentionOutput:
    """The result over `count` keys of score 0 and value 0: out 0 and lse = log(count).

    Shapes, dtypes and device are those of `like`; no memory is allocated for them.
    """
    out = like.out.new_zeros(()).expand(like.out.shape)
    return AttentionOutput(out, like.lse.new_full((), math.log(count)).expand(like.lse.shape))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results are merged and lse is kept: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
