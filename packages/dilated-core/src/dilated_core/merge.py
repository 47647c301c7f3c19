"""Partial attention results merge by their lse: over branches, shards, cache pieces, zero keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch


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
        partials: Results of equal shapes, `out` `(…, D)` and `lse` `(…)`. A partial whose query
            sees no key has lse −inf and whatever finite `out`, and adds nothing.

    Returns:
        The merged result, computed in float32 (float64 if a partial is float64); `out` in the
        dtype of the partials, and 0 with lse −inf where every partial is empty.

    Raises:
        ValueError: If there is no partial, or their shapes differ.

    Example:
        >>> a = AttentionOutput(torch.tensor([1.0]), torch.tensor(0.0))
        >>> b = AttentionOutput(torch.tensor([4.0]), torch.tensor(2.0).log())  # twice the weight
        >>> merge_partials([a, b]).out
        tensor([3.])
    """
    if not partials:
        raise ValueError("partials is empty; merging needs at least one attention result.")
    shapes = {(tuple(p.out.shape), tuple(p.lse.shape)) for p in partials}
    if len(shapes) > 1 or partials[0].lse.shape != partials[0].out.shape[:-1]:
        raise ValueError(
            f"partials have (out, lse) shapes {sorted(shapes)}; they must be equal, and lse must "
            f"have the shape of out without its last dimension."
        )
    dtype = partials[0].out.dtype
    wide = torch.promote_types(dtype, torch.float32)
    lses = torch.stack([p.lse.to(wide) for p in partials])
    # Shifting by a finite maximum keeps −inf − −inf from ever being formed, also in backward.
    largest = lses.detach().amax(0)
    largest = largest.masked_fill(largest == -math.inf, 0)
    weights = (lses - largest).exp()
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1)
    mixed = sum(
        weight.unsqueeze(-1) * p.out.to(wide) for weight, p in zip(weights, partials, strict=True)
    )
    assert isinstance(mixed, torch.Tensor)
    lse = (largest + total.log()).masked_fill(empty, -math.inf)
    return AttentionOutput((mixed / total.unsqueeze(-1)).to(dtype), lse)


def fold_lse_(lse: torch.Tensor, partial_lse: torch.Tensor) -> torch.Tensor:
    """In place, lse becomes logaddexp(lse, partial_lse); returns the weight exp(partial − merged).

    With that weight, `out.lerp_(partial_out, weight)` is the merged output.

    Args:
        lse: float32 or float64, any shape; −inf where nothing has been folded yet.
        partial_lse: Same shape and dtype.
    """
    # −inf − −inf is NaN: a row that is empty so far and in the partial. Its weight is 0. A NaN that
    # comes from the inputs is not hidden by this: it is in the merged lse and in the partial's out.
    weight = (partial_lse - lse).sigmoid_().nan_to_num_(0.0)
    torch.logaddexp(lse, partial_lse, out=lse)
    return weight


def add_zero_keys(partial: AttentionOutput, count: int) -> AttentionOutput:
    """Let every query of `partial` also attend to `count` keys of score 0 and value 0.

    They are one more partial result with out = 0 and lse = log(count).
    """
    zero_lse = math.log(count)
    keep = (partial.lse - zero_lse).sigmoid().unsqueeze(-1)
    return AttentionOutput(
        (partial.out * keep).to(partial.out.dtype),
        torch.logaddexp(partial.lse, torch.full_like(partial.lse, zero_lse)),
    )
