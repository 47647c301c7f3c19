"""How far from the oracle a result may be: twice as far as PyTorch's own attention is from itself.

A hand-picked tolerance says nothing; this budget follows the dtype, the device and the size of the
problem. Errors are relative in the Frobenius norm, so that one shape can stand for another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention

NAMES = ("out", "dq", "dk", "dv")


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in float64; the absolute error where exact is 0.

    NaN if `actual` holds one, so that comparisons with it are false.
    """
    exact = exact.detach().double()
    difference = actual.detach().double() - exact
    norm = exact.square().sum().sqrt().item()
    return difference.square().sum().sqrt().item() / (norm or 1.0)


def pytorch_errors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, *, is_causal: bool
) -> list[float]:
    """Relative errors of PyTorch's dense attention on these tensors, against its float64 self.

    Args:
        q, k, v, dout: `(B, S, H, D)`, in the dtype to judge.
        is_causal: As in the call that is judged.

    Returns:
        Errors of out, dq, dk, dv.
    """

    def attend(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in leaves)
        out = scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=is_causal)
        out = out.transpose(1, 2)
        return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]

    return [
        relative_error(low, exact)
        for low, exact in zip(attend(q.dtype), attend(torch.float64), strict=True)
    ]


def assert_within_budget(
    actual: Sequence[torch.Tensor],
    exact: Sequence[torch.Tensor],
    pytorch: Sequence[float],
    *,
    factor: float = 2.0,
) -> None:
    """Fail unless each result is at most `factor` times as inaccurate as PyTorch's attention.

    Args:
        actual: out, dq, dk, dv in the dtype to judge.
        exact: The same from the oracle, float64.
        pytorch: Errors from `pytorch_errors`.
        factor: How much worse is allowed.

    Raises:
        AssertionError: Naming each result that is not finite or beyond its budget.
    """
    failures: list[str] = []
    for name, a, e, budget in zip(NAMES, actual, exact, pytorch, strict=True):
        # One rounding of the result itself is allowed even where PyTorch happens to be exact.
        allowed = factor * budget + torch.finfo(a.dtype).eps
        error = relative_error(a, e)
        if not error <= allowed:
            failures.append(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    if failures:
        raise AssertionError("; ".join(failures))
