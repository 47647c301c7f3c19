"""How far from the oracle a result may be: twice as far as PyTorch's own attention is from itself.

Unlike a hand-picked tolerance, this budget follows the dtype, the device and the size of the
problem. Errors are relative in the Frobenius norm, so that one shape can stand for another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

from dilated_core.pattern.branches import DilatedPattern

NAMES = ("out", "dq", "dk", "dv")


def relative_error(
    actual: torch.Tensor, exact: torch.Tensor, *, size: float | None = None
) -> float:
    """‖actual − exact‖ / ‖exact‖ in float64; the absolute error where exact is 0.

    Args:
        actual, exact: Of one shape.
        size: Divide by this instead of ‖exact‖; see `term_sizes`.

    Returns:
        NaN if `actual` holds one, so that comparisons with it are false.
    """
    exact = exact.detach().double()
    difference = actual.detach().double() - exact
    return _norm(difference) / (size or _norm(exact) or 1.0)


def pytorch_errors(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    *,
    is_causal: bool,
    pattern: DilatedPattern | None = None,
    sizes: Sequence[float] = (0, 0, 0, 0),
) -> list[float]:
    """Relative errors of PyTorch's dense attention on these tensors, against its float64 self.

    Args:
        q, k, v, dout: `(B, S, H, D)`, in the dtype to judge.
        is_causal: As in the call that is judged.
        pattern: PyTorch gets the pattern as a dense mask, log(count) added to each score, and then
            solves the very problem that is judged. Needed where errors depend on single scores.
        sizes: What errors are relative to, from `term_sizes`; the norms of the results for zeros.

    Returns:
        Errors of out, dq, dk, dv.
    """
    mask = None if pattern is None else _log_counts(pattern, q, is_causal)

    def attend(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in leaves)
        out = scaled_dot_product_attention(
            q_BHSD,
            k_BHSD,
            v_BHSD,
            attn_mask=None if mask is None else mask.to(torch.promote_types(dtype, torch.float32)),
            is_causal=is_causal and mask is None,
        )
        out = out.transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    return [
        relative_error(low, exact, size=size)
        for low, exact, size in zip(attend(q.dtype), attend(torch.float64), sizes, strict=True)
    ]


def term_sizes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    pattern: DilatedPattern,
    *,
    is_causal: bool,
) -> list[float]:
    """Norms of out, dq, dk, dv if all terms of their sums had one sign.

    With large scores a softmax sees one key, and the two terms of ds = p · (dout·v − delta) cancel
    to the last bit. Only the rounding of the terms remains, whatever the size of dq.

    Args:
        q, k, v, dout: `(B, S, H, D)`.
        pattern, is_causal: The problem.
    """
    q, k, v, dout = (x.detach().double().transpose(1, 2) for x in (q, k, v, dout))
    scale = 1 / math.sqrt(q.shape[-1])
    scores = q @ k.mT * scale + _log_counts(pattern, q.transpose(1, 2), is_causal)
    p = scores.softmax(-1).nan_to_num(0.0)
    q, k, v, dout = (x.abs() for x in (q, k, v, dout))
    out = p @ v
    ds = p * (dout @ v.mT + (dout * out).sum(-1, keepdim=True)) * scale
    return [_norm(x) for x in (out, ds @ k, ds.mT @ q, p.mT @ dout)]


def assert_within_budget(
    actual: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    pytorch: Sequence[float],
    *,
    factor: float = 2.0,
    sizes: Sequence[float] = (0, 0, 0, 0),
) -> None:
    """Fail unless each result is at most `factor` times as inaccurate as PyTorch's attention.

    Args:
        actual: out, dq, dk, dv in the dtype to judge.
        exact: The same from the oracle, float64.
        pytorch: Errors from `pytorch_errors`.
        factor: How much worse is allowed.
        sizes: As given to `pytorch_errors`.

    Raises:
        AssertionError: Naming each result that is not finite or beyond its budget.
    """
    failures: list[str] = []
    for name, a, e, budget, size in zip(NAMES, actual, exact, pytorch, sizes, strict=True):
        # One rounding of the result itself is allowed even where PyTorch happens to be exact.
        allowed = factor * budget + torch.finfo(a.dtype).eps
        error = relative_error(a, e, size=size)
        if not error <= allowed:
            failures.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    if failures:
        raise AssertionError("; ".join(failures))


def _norm(x: torch.Tensor) -> float:
    return x.square().sum().sqrt().item()


def _log_counts(pattern: DilatedPattern, q: torch.Tensor, is_causal: bool) -> torch.Tensor:
    """What turns a score into count · exp(score): `(1, H, S, S)` float64 for q `(B, S, H, D)`.

    Of four dimensions: for three, PyTorch leaves its fused kernels.
    """
    counts = pattern.materialize(q.shape[1], q.shape[2], is_causal=is_causal)
    return counts.to(q.device, torch.float64).log().unsqueeze(0)
