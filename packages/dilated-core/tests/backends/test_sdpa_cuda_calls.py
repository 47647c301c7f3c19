"""The CUDA calls of `sdpa`, on tensors without data: operators, arguments and shapes fit.

What they compute is tested on a GPU, by test_conformance.py.
"""

import pytest
import torch
from dilated_core.backends.contract import AttentionOptions
from dilated_core.backends.sdpa import SdpaBackend
from torch._subclasses.fake_tensor import FakeTensorMode

OPTIONS = AttentionOptions(is_causal=True, scale=0.5)


@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("num_rows", [64, 65])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "operator"),
    [
        (torch.bfloat16, 64, (9, 0), "_scaled_dot_product_flash_attention"),
        (torch.float16, 64, (7, 5), "_scaled_dot_product_efficient_attention"),
        (torch.float32, 64, (9, 0), "_scaled_dot_product_efficient_attention"),
        (torch.float16, 320, (9, 0), "_scaled_dot_product_efficient_attention"),
    ],
)
def test_shapes(monkeypatch, dtype, head_dim, capability, operator, num_rows, num_kv_heads):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    called = []
    original = torch._ops.OpOverloadPacket.__call__

    def record(packet, *args, **kwargs):
        called.append(packet._qualified_op_name)
        return original(packet, *args, **kwargs)

    monkeypatch.setattr(torch._ops.OpOverloadPacket, "__call__", record)
    shape, kv_shape = ((2, num_rows, heads, head_dim) for heads in (4, num_kv_heads))
    with FakeTensorMode():
        q, dout, k, v = (
            torch.empty(s, dtype=dtype, device="cuda") for s in (shape, shape, kv_shape, kv_shape)
        )
        out, lse = SdpaBackend().forward(q, k, v, OPTIONS)
        grads = SdpaBackend().backward(dout, q, k, v, out, lse.contiguous(), OPTIONS)
    assert out.shape == shape
    assert lse.shape == shape[:-1]
    assert lse.dtype == torch.float32
    assert [grad.shape for grad in grads] == [shape, kv_shape, kv_shape]
    attention = [name for name in called if "scaled_dot_product" in name]
    assert attention == [f"aten::{operator}", f"aten::{operator}_backward"]
