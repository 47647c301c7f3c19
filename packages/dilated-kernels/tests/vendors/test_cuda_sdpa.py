"""The operators of `cudnn` and `efficient` on tensors without data: names, arguments, shapes.

What the adapters make of them is tested in test_vendor_kernels.py, what they compute on a GPU in
test_vendor_conformance.py.
"""

import pytest
import torch
from dilated_core.backends.contract import AttentionOptions
from dilated_core.backends.eager import EagerBackend
from dilated_kernels.vendors import cuda_sdpa
from torch._subclasses.fake_tensor import FakeTensorMode

OPTIONS = AttentionOptions(is_causal=False, scale=0.5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("num_rows", [64, 65])
@pytest.mark.parametrize(
    ("backend", "operator", "dtype"),
    [
        (cuda_sdpa.cudnn, "_scaled_dot_product_cudnn_attention", torch.bfloat16),
        (cuda_sdpa.efficient, "_scaled_dot_product_efficient_attention", torch.float32),
        (cuda_sdpa.efficient, "_scaled_dot_product_efficient_attention", torch.float16),
    ],
)
def test_pytorch_takes_the_calls(
    monkeypatch, backend, operator, dtype, num_rows, num_kv_heads, is_causal
):
    called = []
    original = torch._ops.OpOverloadPacket.__call__

    def record(packet, *args, **kwargs):
        called.append(packet._qualified_op_name)
        return original(packet, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverloadPacket, "__call__", record)
    shape, kv_shape = ((2, num_rows, heads, 64) for heads in (4, num_kv_heads))
    with FakeTensorMode():
        q, dout, k, v = (
            torch.empty(s, dtype=dtype, device="cuda") for s in (shape, shape, kv_shape, kv_shape)
        )
        out, lse = backend.forward(q, k, v, OPTIONS._replace(is_causal=is_causal))
        grads = backend.backward(dout, q, k, v, out, lse, OPTIONS._replace(is_causal=is_causal))
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    assert lse.dtype == torch.float32
    assert [grad.shape for grad in grads] == [shape, kv_shape, kv_shape]
    assert all(grad.dtype == dtype for grad in grads)
    attention = [name for name in called if "scaled_dot_product" in name]
    assert attention == [f"aten::{operator}", f"aten::{operator}_backward"]


# Argument names in order; those that forward and backward of both kernels are called with.
SCHEMAS = {
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask scale"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q "
        "cum_seq_k max_q max_k dropout_p is_causal scale"
    ),
    "_scaled_dot_product_efficient_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal scale"
    ),
    "_scaled_dot_product_efficient_attention_backward": (
        "grad_out_ query key value attn_bias out logsumexp philox_seed philox_offset dropout_p "
        "grad_input_mask is_causal scale"
    ),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_arguments_are_where_the_adapter_puts_them(name):
    schema = getattr(torch.ops.aten, name).default._schema
    assert [argument.name for argument in schema.arguments] == SCHEMAS[name].split()


def test_pytorchs_layouts_of_lse():
    with FakeTensorMode():
        x = torch.empty(2, 4, 65, 64, dtype=torch.bfloat16, device="cuda")
        cudnn = torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention(x, x, x, None, True)
    assert cudnn[1].shape == (2, 4, 65, 1)
    assert efficient[1].shape == (2, 4, 96)


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_key_never_reaches_cudnn(monkeypatch, is_causal):
    monkeypatch.setattr(cuda_sdpa, "_aten", None)
    q, dout, out = (torch.randn(3, 1, 4, 8, dtype=torch.float64) for _ in range(3))
    k, v = (torch.randn(3, 1, 2, 8, dtype=torch.float64) for _ in range(2))
    lse = torch.randn(3, 1, 4, dtype=torch.float64)
    options = OPTIONS._replace(is_causal=is_causal)
    got = cuda_sdpa.cudnn.forward(q, k, v, options)
    torch.testing.assert_close(got, EagerBackend().forward(q, k, v, options))
    got = cuda_sdpa.cudnn.backward(dout, q, k, v, out, lse, options)
    want = EagerBackend().backward(dout, q, k, v, out, lse, options)
    torch.testing.assert_close(got, want)


def test_cudnn_gets_out_and_dout_in_one_layout(monkeypatch):
    """PyTorch would run the plan that it made for other strides; see the adapter."""
    given = []

    class Aten:
        @staticmethod
        def _scaled_dot_product_cudnn_attention_backward(dout, q, k, v, out, lse, *rest, scale):
            given.extend((dout, out, *rest))
            return q, k, v

    monkeypatch.setattr(cuda_sdpa, "_aten", Aten)
    q, dout, out = (torch.randn(3, 8, 4, 16, dtype=torch.bfloat16)[:, ::2] for _ in range(3))
    k = torch.randn(3, 6, 4, 16, dtype=torch.bfloat16)
    lse = torch.randn(3, 4, 4)
    cuda_sdpa.cudnn.backward(dout, q, k, k, out, lse, OPTIONS)
    for got, wanted in zip(given, (dout, out), strict=False):
        assert got.transpose(1, 2).is_contiguous()
        assert torch.equal(got.transpose(1, 2), wanted)
    max_q_and_k = given[7:9]
    assert max_q_and_k == [4, 6]
