"""Inner tensors are on the device of the data, whatever PyTorch's default device is."""

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, dilated_attention_with_lse
from dilated_core.testing import relative_error

PATTERN = DilatedPattern([8, 16], [1, 3], padding="attended")
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "masked": {"key_padding_mask": torch.arange(60).view(2, 30) % 3 == 0},
    "packed": {"cu_seqlens": torch.tensor([0, 7, 7, 9, 16, 30])},
    "dropout": {"dropout_p": 0.3},
    "limited": {"max_workspace_bytes": 60_000},
    "some heads": {"head_range": (3, 9)},
}


def _results(call, backend, tensors, tangent):
    options = CALLS[call] | {"backend": backend}
    q, k, v = tensors
    torch.manual_seed(0)
    out, lse = dilated_attention_with_lse(q, k, v, PATTERN, **options)
    results = [out, lse, *torch.autograd.grad(out.sum() + lse.clamp(min=-9).sum(), tensors)]
    if call == "dropout":
        return results

    def attend(q):
        return dilated_attention(q, k, v, PATTERN, **options)

    results.append(torch.func.jvp(attend, (q,), (tangent,))[1])
    (dq,) = torch.autograd.grad(attend(q).square().sum(), q, create_graph=True)
    results.extend(torch.autograd.grad(dq.square().sum(), tensors))
    results.append(torch.func.vmap(attend)(torch.stack([q, tangent])))
    return results


@pytest.mark.parametrize("backend", ["eager", "sdpa", "auto"])
@pytest.mark.parametrize("call", CALLS)
def test_default_device_meta(call, backend):
    if (call, backend) == ("dropout", "sdpa"):
        pytest.skip("sdpa has no dropout")
    shape = (30, 4, 8) if call == "packed" else (2, 30, 4, 8)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    tangent = torch.randn(shape, dtype=torch.float64)
    expected = _results(call, backend, tensors, tangent)
    before = torch.get_default_device()
    torch.set_default_device("meta")
    try:
        got = _results(call, backend, tensors, tangent)
    finally:
        torch.set_default_device(before)
    for a, e in zip(got, expected, strict=True):
        assert a.device.type == "cpu"
        sees = e.isfinite()
        assert relative_error(a[sees], e[sees]) < 1e-13
