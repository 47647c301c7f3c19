"""Cross-attention holds no matrix of scores: the largest tensor grows with the lengths only."""

from typing import Any

import pytest
import torch
from dilated_models.layers.cross_attention import CrossAttention, Memory
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns, backward included."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.itemsize)
        return out


@pytest.mark.parametrize("num_kv_heads", [None, 2])
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize(("is_causal", "M"), [(True, 700), (False, 500)])
def test_memory_is_linear_forward_and_backward(is_causal, M, is_padded, num_kv_heads):
    layer = CrossAttention(32, 4, num_kv_heads=num_kv_heads)
    x, states = (torch.randn(2, n, 32, requires_grad=True) for n in (M, 700))
    padding = torch.zeros(2, 700, dtype=torch.bool)
    padding[1, 600:] = True
    memory = Memory(states, is_causal, None, padding if is_padded else None)
    with LargestTensor() as largest:
        layer(x, memory).square().sum().backward()
    assert 2 * 700 * 32 <= largest.numel <= 2 * 2 * 700 * 32 < M * 700
