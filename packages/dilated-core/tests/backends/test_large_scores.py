"""Scores from 1 to 100 000: errors stay within twice those of PyTorch on the same problem.

PyTorch gets the pattern as a mask, so that both see the same ties between large scores: of such a
tie the rounding of two scores decides, and another problem has other ties.
"""

import pytest
import torch
from dilated_core import (
    DecodingCache,
    DilatedPattern,
    decode_step,
    dilated_attention_streamed,
    reference_dilated_attention,
    tensor_sink,
    tensor_source,
)
from dilated_core.testing import relative_error
from dilated_core.testing.error_budget import pytorch_errors

MAGNITUDES = [1e0, 1e1, 1e2, 1e3, 1e4, 1e5]
PATTERNS = {
    "one branch": DilatedPattern([96], [1]),
    "two branches": DilatedPattern([32, 96], [1, 3]),
    "every key three times": DilatedPattern([96, 96, 96], [1, 1, 1]),
}


def problem(magnitude, head_dim, dtype=torch.float32):
    # A large batch: with large scores the few closest ties make most of the error.
    torch.manual_seed(0)
    q, k, v, dout = torch.randn(4, 32, 96, 3, head_dim, dtype=torch.float64).unbind()
    # float16 ends at 65504, so q and k share the factor.
    return [x.to(dtype) for x in (q * magnitude**0.5, k * magnitude**0.5, v, dout)]


def decoded(q, k, v, pattern):
    B, S, H, D = q.shape
    cache = DecodingCache(pattern, batch_size=B, num_heads=H, head_dim=D)
    return torch.cat([decode_step(*(x[:, [t]] for x in (q, k, v)), cache) for t in range(S)], 1)


def streamed(q, k, v, pattern):
    out = torch.empty_like(q)
    dilated_attention_streamed(
        tensor_source(q, k, v), tensor_sink(out), pattern,
        seq_len=q.shape[1], is_causal=True, chunk_length=16,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("attend", [decoded, streamed])
def test_decoding_and_streaming_are_within_the_budget(attend, pattern, magnitude):
    q, k, v, dout = problem(magnitude, head_dim=16)
    error = relative_error(
        attend(q, k, v, pattern), reference_dilated_attention(q, k, v, pattern, is_causal=True)
    )
    pytorch = pytorch_errors(q, k, v, dout, is_causal=True, pattern=pattern)[0]
    assert error <= 2 * pytorch + torch.finfo(torch.float32).eps
