"""The operators and the module of windowed dilated attention."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_sparse import WindowedDilatedAttention, windowed_dilated_attention
from dilated_sparse.operators import choice_for
from dilated_sparse.windowed.ops import WINDOWED
from torch.utils.checkpoint import checkpoint

PATTERN = DilatedPattern([4, 8], [1, 2])


def tensors(*shape: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for _ in range(3)]


@pytest.mark.slow
# opcheck reads .grad of the tensors it compares, leaves or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operators_are_registered_rightly() -> None:
    q, k, v = tensors(1, 20, 2, 8, dtype=torch.float32)
    choice = choice_for("sdpa", q, k, has_dropout=False, has_mask=False)
    options = repr((((4, 8), (1, 2), "interleaved", "masked"), 3, "once", True, None, choice))
    arguments = (0.3, 0.0, options, None, None, None)
    torch.library.opcheck(WINDOWED.forward, (q, k, v, *arguments))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = WINDOWED.forward(q, k, v, *arguments)
    for dlse in (None, torch.randn_like(lse)):
        backward = (torch.randn_like(out), dlse, q, k, v, out, lse, *arguments)
        torch.library.opcheck(WINDOWED.backward, backward)


def test_compiled_and_checkpointed_calls_compute_the_same() -> None:
    inputs = tensors(1, 20, 2, 8)

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return windowed_dilated_attention(*x, PATTERN, 3, is_causal=True)

    plain = attend(*inputs)
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    for other in (compiled(*inputs), checkpoint(attend, *inputs, use_reentrant=False)):
        assert torch.equal(plain, other)
        grads = [
            torch.autograd.grad(x.square().sum(), inputs, retain_graph=True) for x in (plain, other)
        ]
        torch.testing.assert_close(*grads)


def test_the_module_is_the_function_with_its_options() -> None:
    q, k, v = (x.detach() for x in tensors(1, 20, 4, 8))
    module = WindowedDilatedAttention([4, 8], [1, 2], window=3, overlap="added", scale=0.3)
    expected = windowed_dilated_attention(
        q, k, v, PATTERN, 3, is_causal=True, overlap="added", scale=0.3
    )
    assert torch.equal(module(q, k, v, is_causal=True), expected)
    assert repr(module).startswith(
        "WindowedDilatedAttention(segment_lengths=[4, 8], dilation_rates=[1, 2], window=3"
    )
    with pytest.raises(ValueError, match="max_workspace_bytes is 5; windowed attention has no"):
        WindowedDilatedAttention([4], [1], window=3, max_workspace_bytes=5)
    with pytest.raises(ValueError, match="window is 0"):
        WindowedDilatedAttention([4], [1], window=0)
    with pytest.raises(TypeError, match="window"):
        WindowedDilatedAttention([4], [1])
