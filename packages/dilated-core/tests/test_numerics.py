"""What docs/numerics.md promises for scores up to 100 000: where the budget holds, and where not.

The errors are those against the float64 oracle, beside PyTorch's own on the same problem.
"""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, reference_dilated_attention
from dilated_core.testing import relative_error
from dilated_core.testing.error_budget import pytorch_errors

ONE = DilatedPattern([96], [1])
SEVERAL = [DilatedPattern([32, 96], [1, 3]), DilatedPattern([96, 96, 96], [1, 1, 1])]
EPS = torch.finfo(torch.float32).eps


def _errors(pattern, magnitude, backend):
    """Errors of out, dq, dk and dv, and what the budget allows for each."""
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 32, 96, 3, 16, dtype=torch.float64).unbind()
    q, k, v, dout = (x.float() for x in (q * magnitude**0.5, k * magnitude**0.5, v, dout))
    results = []
    for attend, dtype in (
        (lambda *x: dilated_attention(*x, pattern, backend=backend), torch.float32),
        (lambda *x: reference_dilated_attention(*x, pattern), torch.float64),
    ):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout.to(dtype))])
    errors = [relative_error(a, e) for a, e in zip(*results, strict=True)]
    pytorch = pytorch_errors(q, k, v, dout, is_causal=False, pattern=pattern)
    return errors, [2 * error + EPS for error in pytorch]


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("magnitude", [1e0, 1e1, 1e2, 1e3, 1e4, 1e5])
def test_one_branch_is_within_the_budget_at_any_score(magnitude, backend):
    errors, allowed = _errors(ONE, magnitude, backend)
    assert all(e <= a for e, a in zip(errors, allowed, strict=True)), (errors, allowed)


@pytest.mark.parametrize("pattern", SEVERAL, ids=["two branches", "three equal branches"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("magnitude", [1e0, 1e1, 1e2, 1e3, 1e4, 1e5])
def test_several_branches_leave_it_in_dv_alone_and_by_the_rounding_of_lse(
    magnitude, backend, pattern
):
    errors, allowed = _errors(pattern, magnitude, backend)
    assert all(e <= a for e, a in zip(errors[:3], allowed[:3], strict=True)), (errors, allowed)
    # exp(s − lse) is off by half the spacing of float32 at the lse, which is a few magnitudes.
    spacing = torch.finfo(torch.float32).eps * 4 * magnitude
    assert errors[3] <= allowed[3] + spacing
    if magnitude <= 10:
        assert errors[3] <= allowed[3]
