"""What all adapters share, over a kernel that is the plain attention of core.

The kernel notes what it is given, and fails where a real one would: on batches beyond a CUDA grid,
on rows that no 16-byte load can reach, on an lse that is not in order.
"""

from dataclasses import replace

import pytest
import torch
from dilated_core import dilated_attention, register_backend
from dilated_core.backends.contract import AttentionOptions
from dilated_core.backends.eager import EagerBackend
from dilated_core.backends.registry import unregister_backend
from dilated_core.testing import AWKWARD_CASES, BackendConformance
from dilated_kernels.vendors import adapter

NAMED = {case.name: case for case in AWKWARD_CASES}
OPTIONS = AttentionOptions(is_causal=False, scale=1.0)


class Kernel:
    def __init__(self):
        self.batches = []

    def check(self, *tensors):
        for x in tensors:
            assert 0 < x.shape[0] <= adapter._MAX_BATCH
            assert x.stride(-1) == 1
            assert (x.storage_offset() * x.element_size()) % 16 == 0
            for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
                assert size == 1 or (stride > 0 and (stride * x.element_size()) % 16 == 0)

    def attend(self, q, k, v, is_causal, scale):
        self.check(q, k, v)
        assert scale > 0
        self.batches.append(len(q))
        options = AttentionOptions(is_causal, scale)
        out, lse = EagerBackend().forward(q, k, v, options)
        return out, lse.transpose(1, 2)

    def differentiate(self, dout, q, k, v, out, lse, is_causal, scale):
        self.check(dout, q, k, v, out)
        assert scale > 0
        assert lse.is_contiguous()
        assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        self.batches.append(len(q))
        options = AttentionOptions(is_causal, scale)
        return EagerBackend().backward(dout, q, k, v, out, lse.transpose(1, 2), options)


@pytest.fixture
def kernel():
    kernel = Kernel()
    backend = adapter.VendorBackend(
        "plain", 1, lambda inputs: [], kernel.attend, kernel.differentiate
    )
    kernel.backend = backend
    register_backend(backend)
    yield kernel
    unregister_backend("plain")


class Suite(BackendConformance):
    __test__ = False
    backend = "plain"
    dtypes = (torch.float64,)


def test_batches_beyond_the_grid_are_split(kernel, monkeypatch):
    monkeypatch.setattr(adapter, "_MAX_BATCH", 3)
    for name in ("even", "tail, batch", "one kv head, causal", "negative scale"):
        Suite()._compare_with_oracle(NAMED[name], torch.float64, 1e-10)
    assert max(kernel.batches) == 3
    kernel.batches.clear()
    x = torch.zeros(7, 4, 1, 8)
    out, lse = kernel.backend.forward(x, x, x, OPTIONS)
    kernel.backend.backward(x, x, x, x, out, lse, OPTIONS)
    assert kernel.batches == [3, 3, 1] * 2


def test_the_grid_is_that_of_cuda():
    assert adapter._MAX_BATCH == 65535


@pytest.mark.parametrize("padding", [(1, 0), (0, 1), (2, 1)])
def test_rows_that_no_load_can_reach_are_copied(kernel, padding):
    case = replace(NAMED["grouped queries"], batch_size=2)
    q, k, v, dout = case.tensors(dtype=torch.float64)
    expected = dilated_attention(q, k, v, case.pattern, backend="eager")
    want = torch.autograd.grad(expected, (q, k, v), dout)
    odd = [torch.nn.functional.pad(x.detach(), padding) for x in (q, k, v)]
    cut = [x[..., padding[0] : padding[0] + 8].requires_grad_() for x in odd]
    out = dilated_attention(*cut, case.pattern, backend="plain")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(out, cut, dout)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_contiguous_tensor_at_an_odd_address_is_copied(kernel):
    x = torch.randn(2 * 4 * 8 + 1, dtype=torch.float64)[1:].view(2, 4, 1, 8)
    assert x.is_contiguous()
    out, _ = kernel.backend.forward(x, x, x, OPTIONS)
    expected, _ = EagerBackend().forward(x, x, x, OPTIONS)
    assert torch.equal(out, expected)


def test_aligned_strips_are_not_copied():
    x = torch.zeros(2, 8, 4, 8, dtype=torch.bfloat16)
    for view in (x, x[:, ::2], x[:, 1:], x[:1, :, 2:], x.transpose(1, 2), x[:, :, :1]):
        assert adapter._aligned(view) is view


def test_kernels_get_the_lse_that_they_know(kernel):
    """In float32 and contiguous, however a caller has merged it."""
    seen = []

    def differentiate(dout, q, k, v, out, lse, is_causal, scale):
        seen.append(lse)
        return q, k, v

    backend = adapter.VendorBackend("", 1, lambda inputs: [], kernel.attend, differentiate)
    x = torch.zeros(2, 3, 4, 8, dtype=torch.bfloat16)
    lse = torch.randn(4, 3, 2, dtype=torch.float64).permute(2, 1, 0)
    backend.backward(x, x, x, x, x, lse, OPTIONS)
    (got,) = seen
    assert got.is_contiguous()
    assert torch.equal(got, lse.float().transpose(1, 2))


def test_keys_without_queries_have_gradient_zero(kernel):
    q, k = torch.empty(1, 0, 2, 8), torch.ones(1, 5, 2, 8)
    _, dk, dv = kernel.backend.backward(q, q, k, k, q, q[..., 0], OPTIONS)
    assert (torch.stack([dk, dv]) == 0).all()


def test_nothing_to_attend_to(kernel):
    q, k = torch.empty(0, 4, 2, 8), torch.empty(0, 4, 1, 8)
    out, lse = kernel.backend.forward(q, k, k, OPTIONS)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (0, 4, 2), torch.float32)
    grads = kernel.backend.backward(q, q, k, k, out, lse, OPTIONS)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]
    assert kernel.batches == []


@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_an_infinite_lse_is_nan(infinity):
    """flash-attn returns it for a row whose sum of exponentials is NaN."""

    def attend(q, k, v, is_causal, scale):
        return v, q.new_tensor([0.5, infinity]).expand(1, 1, 2)

    backend = adapter.VendorBackend("", 1, lambda inputs: [], attend, lambda *_: None)
    x = torch.ones(1, 2, 1, 8)
    _, lse = backend.forward(x, x, x, OPTIONS)
    assert lse[0, 0] == 0.5
    assert lse[0, 1].isnan()


@pytest.mark.parametrize("refused", [{"dropout_p": 0.5}, {"key_padding_mask": torch.ones(1, 4, 2)}])
def test_callers_that_skipped_why_not_are_refused(kernel, refused):
    x = torch.zeros(1, 4, 2, 8)
    options = OPTIONS._replace(**refused)
    with pytest.raises(ValueError, match="'plain' has neither dropout"):
        kernel.backend.forward(x, x, x, options)
    with pytest.raises(ValueError, match="'plain' has neither dropout"):
        kernel.backend.backward(x, x, x, x, x, x[..., 0], options)


def test_repeated_heads_and_their_sum():
    q, k = torch.zeros(1, 3, 6, 2), torch.randn(1, 3, 2, 2)
    heads = adapter.repeated(k, q)
    assert torch.equal(heads[:, :, 2], k[:, :, 0])
    assert torch.equal(heads[:, :, 3], k[:, :, 1])
    torch.testing.assert_close(adapter.summed(heads, k), 3 * k)
    assert adapter.repeated(k, k) is k
    assert adapter.summed(k, k) is k
