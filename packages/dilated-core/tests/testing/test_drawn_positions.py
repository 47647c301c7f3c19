"""The oracle at drawn positions agrees with the dense one, and sees what is wrong."""

import pytest
import torch
from dilated_core import DilatedPattern, reference_dilated_attention_with_lse
from dilated_core.testing import errors_at_drawn_positions

NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_drawn_positions_agree_with_the_oracle(is_causal, num_kv_heads):
    pattern = DilatedPattern([10, 24, 70], [2, 3, 5], head_offsets="blocked")  # leaves rows empty
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, 61, heads, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for heads in (4, num_kv_heads, num_kv_heads, 4)
    )
    out, lse = reference_dilated_attention_with_lse(q, k, v, pattern, is_causal=is_causal)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    results = dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))
    assert (lse == -torch.inf).any()

    def errors(changes, heads=4, pattern=pattern):
        return errors_at_drawn_positions(
            *(q, k, v, dout), results | changes, pattern, is_causal=is_causal, num_heads=heads
        )

    found = errors({})
    assert list(found) == list(NAMES[: 5 if num_kv_heads == 4 else 3])
    assert max(found.values()) < 1e-12
    for name in found:
        assert errors({name: results[name] * 1.001}, 3)[name] == pytest.approx(1e-3, rel=1e-6)
    # A row that should be empty and is not.
    assert not errors({"lse": lse.detach().masked_fill(lse == -torch.inf, -5.0)})["lse"] < 1
    with pytest.raises(ValueError, match="zero keys are not part"):
        errors({}, pattern=DilatedPattern([8], [1], padding="attended"))
