"""What docs/numerics.md promises for scores up to 100 000, and for infinite ones.

Errors are those against the float64 oracle, beside PyTorch's own on the same problem.
"""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, reference_dilated_attention
from dilated_core.testing import relative_error
from dilated_core.testing.error_budget import pytorch_errors
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

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


def _infinite(case):
    """q, k and v of four positions: query 1, key 2, or all scores are −∞."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 2, 4).unbind()
    if case == "query":
        k[..., 0] = -1
        q[:, 1] = torch.tensor([torch.inf, 0, 0, 0])
    else:
        q[..., 0] = 1
        k[:, 2 if case == "key" else slice(None)] = torch.tensor([-torch.inf, 0, 0, 0])
    return [x.requires_grad_() for x in (q, k, v)]


@pytest.mark.parametrize("scale", [0.5, 0.0])
@pytest.mark.parametrize("case", ["query", "key", "everything"])
def test_infinite_scores_as_in_pytorch(case, scale):
    tensors = _infinite(case)
    out = dilated_attention(*tensors, DilatedPattern([4], [1]), scale=scale, backend="eager")
    with sdpa_kernel([SDPBackend.MATH]):
        wanted = scaled_dot_product_attention(*(x.transpose(1, 2) for x in tensors), scale=scale)
    wanted = wanted.transpose(1, 2)
    pairs = [
        (out, wanted),
        *zip(*(torch.autograd.grad(x.sum(), tensors) for x in (out, wanted)), strict=True),
    ]
    for a, e in pairs:
        torch.testing.assert_close(a, e, equal_nan=True)


def test_a_branch_whose_scores_are_all_infinite_adds_nothing():
    q, k, v = torch.randn(3, 1, 4, 2, 4, dtype=torch.float64).unbind()
    q[..., 0], k[:, :2] = 1, torch.tensor([-torch.inf, 0, 0, 0])
    pattern = DilatedPattern([2, 4], [1, 1])  # queries 0 and 1 see finite scores in branch 2 alone
    out = dilated_attention(q, k, v, pattern, backend="eager")
    torch.testing.assert_close(out, reference_dilated_attention(q, k, v, pattern))
