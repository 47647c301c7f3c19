"""What a backend returns is compared with the contract, and a mismatch names backend and rule."""

import pytest
import torch
from dilated_core import (
    AttentionOutput,
    DilatedPattern,
    dilated_attention,
    dilated_attention_with_lse,
    register_backend,
    unregister_backend,
)
from dilated_core.backends.eager import EagerBackend

WHOLE = DilatedPattern([8], [1])
STRIPS = DilatedPattern([4, 8], [1, 2])


class Changed(EagerBackend):
    """`eager` with its results changed by two functions."""

    name = "changed"

    def __init__(self, forward=lambda out, lse: (out, lse), backward=lambda dq, dk, dv: None):
        self.change_output, self.change_gradients = forward, backward

    def forward(self, q, k, v, options):
        return AttentionOutput(*self.change_output(*super().forward(q, k, v, options)))

    def backward(self, *tensors, delta=None):
        grads = super().backward(*tensors, delta=delta)
        return self.change_gradients(*grads) or grads


class Whole(Changed):
    """A backend for whole patterns, which computes them by `eager`, with its results changed."""

    def dilated_forward(self, q, k, v, pattern, options, *, cu_seqlens):
        result = dilated_attention_with_lse(q, k, v, pattern, backend="eager")
        return AttentionOutput(*self.change_output(*result))

    def dilated_backward(self, dout, dlse, q, k, v, out, lse, pattern, options, *, cu_seqlens):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = dilated_attention(*leaves, pattern, backend="eager")
        grads = torch.autograd.grad(out, leaves, dout)
        return self.change_gradients(*grads) or grads


@pytest.fixture(params=[Changed, Whole])
def run(request):
    def run(pattern, *, dtype=torch.float32, **changes):
        register_backend(request.param(**changes))
        try:
            q, k, v = torch.randn(3, 1, 8, 4, 8, dtype=dtype, requires_grad=True).unbind()
            k, v = k[:, :, :2], v[:, :, :2]
            dilated_attention(q, k, v, pattern, backend="changed").sum().backward()
        finally:
            unregister_backend("changed")

    return run


@pytest.mark.parametrize("pattern", [WHOLE, STRIPS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda out, lse: (out, lse.transpose(1, 2)),
            r"'changed' returned out of shape \(.*\) and lse of shape \(1, \d, \d\) for q .* lse",
        ),
        (lambda out, lse: (out, lse[:, :1]), "and lse that shape without head_dim"),
        (lambda out, lse: (out[..., :4], lse), "out must have the shape of q"),
        (lambda out, lse: (out.transpose(1, 2), lse), "out must have the shape of q"),
        (
            lambda out, lse: (out.double(), lse),
            r"'changed' returned out in torch.float64 .* out must have the dtype of q",
        ),
        (lambda out, lse: (out, lse.double()), "lse torch.float32"),
    ],
)
def test_a_wrong_output_is_refused(run, pattern, change, message):
    with pytest.raises(ValueError, match=message):
        run(pattern, forward=change)


def test_the_lse_of_half_precision_is_float32(run):
    with pytest.raises(ValueError, match=r"lse in torch.bfloat16 .* and lse torch.float32"):
        run(WHOLE, dtype=torch.bfloat16, forward=lambda out, lse: (out, lse.bfloat16()))


@pytest.mark.parametrize("pattern", [WHOLE, STRIPS])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dq, dk, dv: (dq[:, :1], dk, dv), "'changed' returned dq .* shape of q"),
        # One head for each head of q: the sum over the heads that share one is missing.
        (lambda dq, dk, dv: (dq, dq, dv), "'changed' returned dk .* shape of k"),
        (lambda dq, dk, dv: (dq, dk, dv.sum(0)), "'changed' returned dv .* shape of v"),
        (
            lambda dq, dk, dv: (dq, dk.double(), dv),
            r"'changed' returned dk .* in torch.float64; .* and its dtype, torch.float32",
        ),
        (lambda dq, dk, dv: (dq, dk), "'changed' returned 2 gradients; it must return dq, dk"),
    ],
)
def test_a_wrong_gradient_is_refused(run, pattern, change, message):
    with pytest.raises(ValueError, match=message):
        run(pattern, backward=change)


def test_right_results_are_accepted(run):
    run(WHOLE)
    run(STRIPS, dtype=torch.bfloat16)
