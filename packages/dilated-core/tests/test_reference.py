"""The oracle against what is not ours: sums by hand, PyTorch, and the published code."""

import json
import math
from pathlib import Path

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    dilated_attention,
    reference_dilated_attention,
    reference_dilated_attention_with_lse,
)
from safetensors import safe_open
from torch.nn.functional import scaled_dot_product_attention

GOLDEN = Path(__file__).parent / "data" / "torchscale_dilated_attention.safetensors"
# The published code computes in float32.
GOLDEN_TOLERANCE = 5e-6


@pytest.mark.parametrize("is_causal", [False, True])
def test_one_undilated_branch_is_dense_attention(is_causal):
    q, k, v = torch.randn(3, 2, 20, 3, 8, dtype=torch.float64).unbind()
    expected = scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=is_causal
    ).transpose(1, 2)
    out = reference_dilated_attention(q, k, v, DilatedPattern([20], [1]), is_causal=is_causal)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("n", [2**63, 2**64 + 3, 2**100])
@pytest.mark.parametrize("options", [{}, {"head_offsets": "blocked", "padding": "attended"}])
def test_lengths_and_rates_beyond_64_bits(n, options):
    """No position is as far as 2^63, so S + 1 stands for n."""
    q, k, v = torch.randn(3, 1, 20, 4, 8, dtype=torch.float64).unbind()
    got, want = (
        reference_dilated_attention(
            q, k, v, DilatedPattern([m, 7, m, m], [1, m, m - 1, 3], **options)
        )
        for m in (n, 21)
    )
    assert torch.equal(got, want)


def test_worked_example():
    """Two heads, four positions, w = 4, r = 2, beside w = 2, r = 1: head 0, query 2 by hand."""
    q = torch.ones(1, 4, 2, 1)
    k = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 4, 1, 1).expand(1, 4, 2, 1)
    v = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 4, 1, 1).expand(1, 4, 2, 1)
    pattern = DilatedPattern([2, 4], [1, 2])
    out, lse = reference_dilated_attention_with_lse(q, k, v, pattern)
    # Head 0 sees 2, 3 in its segment and 0, 2 in the dilated one: key 2 counts twice.
    weights = {0: 1.0, 2: 2 * math.exp(2), 3: math.exp(3)}
    total = sum(weights.values())
    expected = (weights[0] * 10 + weights[2] * 30 + weights[3] * 40) / total
    assert out[0, 2, 0, 0].item() == pytest.approx(expected, abs=1e-12)
    assert lse[0, 2, 0].item() == pytest.approx(math.log(total), abs=1e-12)
    # Head 1 starts at 1, so its dilated branch does not keep position 2.
    assert lse[0, 2, 1].item() == pytest.approx(math.log(math.exp(2) + math.exp(3)), abs=1e-12)


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_masked_row_holds_anything(is_causal):
    """Its key and value count as nothing, and have gradient 0."""
    q, k, v, dout = torch.randn(4, 2, 12, 2, 4, dtype=torch.float64).unbind()
    mask = torch.rand(2, 12) < 0.5
    pattern = DilatedPattern([4, 12], [1, 2])
    results = []
    for value in (0.0, math.nan, math.inf, 1e300):
        leaves = [
            q.clone().requires_grad_(),
            *(x.masked_fill(mask[..., None, None], value).requires_grad_() for x in (k, v)),
        ]
        out, lse = reference_dilated_attention_with_lse(
            *leaves, pattern, is_causal=is_causal, key_padding_mask=mask
        )
        grads = torch.autograd.grad((out, lse.exp()), leaves, (dout, dout[..., 0]))
        results.append((out, lse, *grads))
        assert all((grad[mask] == 0).all() for grad in grads[1:])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_mixing_by_denominators_is_the_union_softmax():
    """The paper's equations 9 and 10, written out, give what the oracle computes."""
    q, k, v = torch.randn(3, 1, 16, 1, 4, dtype=torch.float64).unbind()
    branches = [DilatedPattern([8], [1]), DilatedPattern([16], [1])]
    outs = [reference_dilated_attention(q, k, v, b) for b in branches]
    denominators = []
    for w in (8, 16):
        s = (q[0, :, 0] @ k[0, :, 0].T / 2).exp()
        same = torch.arange(16)[:, None] // w == torch.arange(16)[None, :] // w
        denominators.append((s * same).sum(-1)[None, :, None, None])
    mixed = sum(o * d for o, d in zip(outs, denominators, strict=True)) / sum(denominators)
    both = reference_dilated_attention(q, k, v, DilatedPattern([8, 16], [1, 1]))
    torch.testing.assert_close(mixed, both, rtol=0, atol=1e-14)


def _golden_cases():
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["cases"])


@pytest.mark.parametrize("index", range(len(_golden_cases())))
@pytest.mark.parametrize("backend", ["reference", "eager", "sdpa"])
def test_published_code(index, backend):
    """Blocked offsets and attended zero padding give the published code's outputs."""
    case = _golden_cases()[index]
    with safe_open(GOLDEN, "pt") as file:
        q, k, v, expected = (file.get_tensor(f"{index}.{name}") for name in "qkvo")
    pattern = DilatedPattern(
        case["segment_lengths"],
        case["dilation_rates"],
        head_offsets="blocked",
        padding="attended",
    )
    if backend == "reference":
        out = reference_dilated_attention(q, k, v, pattern, is_causal=case["is_causal"])
    else:
        out = dilated_attention(q, k, v, pattern, is_causal=case["is_causal"], backend=backend)
    assert (out - expected).abs().max().item() <= GOLDEN_TOLERANCE


def test_golden_data_tells_the_options_apart():
    """The uneven cases do differ without the attended padding, and with the other offsets."""
    case = _golden_cases()[4]
    with safe_open(GOLDEN, "pt") as file:
        q, k, v, expected = (file.get_tensor(f"4.{name}") for name in "qkvo")
    for options in (
        {"head_offsets": "blocked", "padding": "masked"},
        {"head_offsets": "interleaved", "padding": "attended"},
    ):
        pattern = DilatedPattern(case["segment_lengths"], case["dilation_rates"], **options)
        out = reference_dilated_attention(q, k, v, pattern)
        assert (out - expected).abs().max().item() > 1e-2


def test_the_oracle_refuses_what_attention_refuses():
    q = k = v = torch.ones(1, 3, 2, 4)
    pattern = DilatedPattern([2], [2])
    with pytest.raises(TypeError, match="is_causal is 'False'; it must be True or False"):
        reference_dilated_attention(q, k, v, pattern, is_causal="False")
    with pytest.raises(ValueError, match="scale is nan; it must be finite"):
        reference_dilated_attention(q, k, v, pattern, scale=float("nan"))
    with pytest.raises(TypeError, match=r"key_padding_mask has dtype .*32; it must be"):
        reference_dilated_attention(q, k, v, pattern, key_padding_mask=torch.zeros(1, 3))
    assert reference_dilated_attention(*(x[:, :, :0] for x in (q, k, v)), pattern).shape[2] == 0
