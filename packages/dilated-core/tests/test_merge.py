import math

import pytest
import torch
from dilated_core import AttentionOutput, DilatedPattern, dilated_attention_with_lse, merge_partials
from dilated_core.merge import add_zero_keys, fold_lse_


def _attend(q, k, v):
    s = q @ k.transpose(-1, -2)
    return AttentionOutput(s.softmax(-1) @ v, s.logsumexp(-1))


def test_split_keys_and_merge():
    q, k, v = (torch.randn(2, 7, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    pieces = [slice(0, 1), slice(1, 4), slice(4, 7)]
    merged = merge_partials([_attend(q, k[:, p], v[:, p]) for p in pieces])
    whole = _attend(q, k, v)
    torch.testing.assert_close(merged, whole, rtol=0, atol=1e-14)
    dout, dlse = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 7, dtype=torch.float64)
    torch.testing.assert_close(
        torch.autograd.grad(merged, (q, k, v), (dout, dlse)),
        torch.autograd.grad(whole, (q, k, v), (dout, dlse)),
        rtol=0,
        atol=1e-13,
    )


def test_branches_merge_to_the_pattern():
    q, k, v = torch.randn(3, 1, 33, 4, 8, dtype=torch.float64).unbind()
    pattern = DilatedPattern([8, 33, 16], [1, 4, 2])
    parts = [
        dilated_attention_with_lse(q, k, v, DilatedPattern([w], [r])) for w, r in pattern.branches
    ]
    whole = dilated_attention_with_lse(q, k, v, pattern)
    torch.testing.assert_close(merge_partials(parts), whole, rtol=0, atol=1e-13)


def test_empty_rows():
    inf = float("inf")
    out = torch.tensor([[3.0], [5.0], [0.0]], requires_grad=True)
    lse = torch.tensor([1.0, -inf, -inf], requires_grad=True)
    other_out = torch.tensor([[7.0], [9.0], [0.0]], requires_grad=True)
    other_lse = torch.tensor([-inf, 2.0, -inf], requires_grad=True)
    merged = merge_partials([AttentionOutput(out, lse), AttentionOutput(other_out, other_lse)])
    assert merged.out.tolist() == [[3.0], [9.0], [0.0]]
    assert merged.lse.tolist() == [1.0, 2.0, -inf]
    finite = merged.lse.masked_fill(merged.lse == -inf, 0)
    (merged.out.sum() + finite.sum()).backward()
    assert out.grad.tolist() == [[1.0], [0.0], [0.0]]
    assert lse.grad.tolist() == [1.0, 0.0, 0.0]
    assert other_lse.grad.tolist() == [0.0, 1.0, 0.0]


def test_extreme_lse_does_not_overflow():
    parts = [
        AttentionOutput(torch.tensor([float(i)]), torch.tensor(lse))
        for i, lse in enumerate([-3e4, 3e4, 3e4])
    ]
    merged = merge_partials(parts)
    assert merged.out.item() == 1.5
    assert merged.lse.item() == pytest.approx(3e4 + math.log(2), abs=0.01)


def test_half_precision_is_merged_in_float32():
    parts = [
        AttentionOutput(torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor(0.0))
        for _ in range(1000)
    ]
    merged = merge_partials(parts)
    assert merged.out.dtype == torch.bfloat16
    assert merged.out.item() == 1.0
    assert merged.lse.dtype == torch.float32


def test_mistakes():
    part = AttentionOutput(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="partials is empty; merging needs at least one"):
        merge_partials([])
    with pytest.raises(ValueError, match="they must be equal, and lse must have the shape of out"):
        merge_partials([part, AttentionOutput(torch.zeros(3, 3), torch.zeros(3))])
    with pytest.raises(ValueError, match="lse must have the shape of out without"):
        merge_partials([AttentionOutput(torch.zeros(2, 3), torch.zeros(3))])


def test_fold_in_place_equals_merge():
    a, b = torch.randn(2, 5, dtype=torch.float64).unbind()
    a[0] = b[0] = b[1] = a[2] = -torch.inf
    out_a, out_b = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    out_a[0] = out_b[0] = 0
    expected = merge_partials([AttentionOutput(out_a, a), AttentionOutput(out_b, b)])
    lse = a.clone()
    out = out_a.lerp(out_b, fold_lse_(lse, b).unsqueeze(-1))
    torch.testing.assert_close(lse, expected.lse, rtol=0, atol=1e-15)
    torch.testing.assert_close(out, expected.out, rtol=0, atol=1e-15)


def test_zero_keys_are_keys_of_zeros():
    q, k, v = torch.randn(3, 2, 7, 4, dtype=torch.float64).unbind()
    zeros = torch.zeros(2, 3, 4, dtype=torch.float64)
    expected = _attend(q, torch.cat([k, zeros], 1), torch.cat([v, zeros], 1))
    torch.testing.assert_close(add_zero_keys(_attend(q, k, v), 3), expected, rtol=0, atol=1e-14)
