import math

import pytest
import torch
from dilated_core import AttentionOutput, DilatedPattern, dilated_attention_with_lse, merge_partials
from dilated_core.merge import empty_partial, fold_, fold_lse_, zero_key_partial
from hypothesis import given
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan

# Differences of lse up to 600, so that no weight underflows: 0 · inf would be NaN.
LSES = st.floats(-300, 300) | st.sampled_from([-INF, -INF, 300.0, NAN, INF])
OUTS = st.floats(-1e3, 1e3) | st.sampled_from([NAN, INF, -INF, 1e308])


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


def _merged_row(partials: list[tuple[float, float]]) -> tuple[float, float]:
    """(out, lse) from (lse, out) of one row, by the definition."""
    partials = [(lse, out) for lse, out in partials if lse != -INF]
    if not partials:
        return 0.0, -INF
    if any(lse == INF or lse != lse for lse, _ in partials):
        return NAN, NAN
    largest = max(lse for lse, _ in partials)
    weights = [math.exp(lse - largest) for lse, _ in partials]
    total = math.fsum(weights)
    out = sum(weight / total * out for weight, (_, out) in zip(weights, partials, strict=True))
    return out, largest + math.log(total)


@given(rows=st.integers(1, 5).flatmap(
    lambda count: st.lists(
        st.lists(st.tuples(LSES, OUTS), min_size=count, max_size=count), min_size=1, max_size=6
    )
))  # fmt: skip
def test_any_rows(rows):
    """Each row is what the definition gives, with NaN, infinities and empty partials in others."""
    lses, outs = torch.tensor(rows, dtype=torch.float64).permute(2, 1, 0)
    merged = merge_partials(
        [AttentionOutput(out.unsqueeze(-1), lse) for lse, out in zip(lses, outs, strict=True)]
    )
    expected = torch.tensor([_merged_row(row) for row in rows], dtype=torch.float64)
    got = torch.stack([merged.out.squeeze(-1), merged.lse], -1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


@given(rows=st.integers(1, 5).flatmap(
    lambda count: st.lists(
        st.lists(
            st.tuples(st.floats(-1e5, 1e5) | st.sampled_from([-INF, NAN]), st.floats(-1e3, 1e3)),
            min_size=count,
            max_size=count,
        ),
        min_size=1,
        max_size=6,
    )
))  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folding_any_rows(dtype, rows):
    """Folding one partial after the other, in float32 as in float64; a NaN stays in its row."""
    lses, outs = torch.tensor(rows, dtype=dtype).permute(2, 1, 0).unbind()
    outs = outs.masked_fill(lses == -INF, 0).unsqueeze(-1)
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -INF)
    for partial_out, partial_lse in zip(outs, lses, strict=True):
        out.lerp_(partial_out, fold_lse_(lse, partial_lse).unsqueeze(-1))
    exact = [list(zip(*row, strict=True)) for row in zip(lses.T, outs[..., 0].T, strict=True)]
    expected = torch.tensor([_merged_row(row) for row in exact], dtype=torch.float64)
    eps = torch.finfo(dtype).eps

    def finite(x):
        return x.double().nan_to_num(nan=1e30, neginf=-1e30)

    # The rounding of lse, at its size, is what remains of a weight.
    bound = len(lses) * eps * (1e3 * finite(lses).masked_fill(lses == -INF, 0).abs().amax(0) + 1e4)
    assert ((finite(out[:, 0]) - finite(expected[:, 0])).abs() <= bound).all()
    assert ((finite(lse) - finite(expected[:, 1])).abs() <= bound).all()


def test_an_empty_partial_may_hold_anything():
    """A kernel may leave garbage in rows that see no key."""
    garbage = torch.tensor([[NAN], [INF], [3.0]], requires_grad=True)
    empty = torch.full((3,), -INF, requires_grad=True)
    out = torch.tensor([[1.0], [2.0], [0.0]], requires_grad=True)
    lse = torch.tensor([0.5, 0.5, -INF], requires_grad=True)
    for order in (1, -1):
        parts = [AttentionOutput(garbage, empty), AttentionOutput(out, lse)][::order]
        merged = merge_partials(parts)
        assert merged.out.tolist() == [[1.0], [2.0], [0.0]]
        assert merged.lse.tolist() == [0.5, 0.5, -INF]
        grads = torch.autograd.grad(merged.out.sum(), (garbage, out, empty, lse))
        assert [grad.flatten().tolist() for grad in grads] == [
            [0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]
        ]  # fmt: skip


def test_large_outs_do_not_overflow():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        largest = torch.tensor([torch.finfo(dtype).max], dtype=dtype)
        parts = [AttentionOutput(largest, torch.tensor(lse)) for lse in (0.1, 0.2, 0.3)]
        assert merge_partials(parts).out.isfinite().all()


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
    with pytest.raises(TypeError, match=r"have out of dtypes .*; they must be equal, so convert"):
        merge_partials([part, AttentionOutput(torch.zeros(2, 3).bfloat16(), torch.zeros(2))])
    with pytest.raises(TypeError, match=r"lse of dtype torch\.int64; both must be floating-point"):
        merge_partials([part, AttentionOutput(part.out, part.lse.long())])
    with pytest.raises(TypeError, match=r"have out of dtype torch\.int64 and lse"):
        merge_partials([AttentionOutput(part.out.long(), part.lse)])


def test_the_widest_dtype_is_computed_in():
    """An lse in float64 beside an out in float32 is not rounded."""
    out = torch.tensor([1.0])
    lses = torch.tensor([1e6, 1e6 + 1e-3], dtype=torch.float64)
    merged = merge_partials([AttentionOutput(out * i, lse) for i, lse in enumerate(lses)])
    assert merged.out.dtype == torch.float32
    assert merged.lse.dtype == torch.float64
    assert merged.out.item() == pytest.approx(1 / (1 + math.exp(-1e-3)), abs=1e-7)
    assert merged.lse.item() == pytest.approx(1e6 + math.log(1 + math.exp(1e-3)), abs=1e-9)


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
    partial = _attend(q, k, v)
    zero_keys = zero_key_partial(3, partial)
    torch.testing.assert_close(merge_partials([partial, zero_keys]), expected, rtol=0, atol=1e-14)
    fold_(partial, zero_keys)
    torch.testing.assert_close(partial, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folding_into_nothing_is_the_partial_and_order_does_not_matter(dtype):
    partials = [
        AttentionOutput(torch.randn(3, 7, 4).to(dtype), torch.randn(3, 7).double())
        for _ in range(4)
    ]
    partials[1].lse[0, :3] = -torch.inf
    partials = [
        AttentionOutput(p.out, p.lse.to(torch.promote_types(dtype, torch.float32)))
        for p in partials
    ]
    into = empty_partial((3, 7, 4), dtype=dtype, device="cpu")
    fold_(into, partials[0])
    assert torch.equal(into.out, partials[0].out.to(into.out.dtype))
    assert torch.equal(into.lse, partials[0].lse)
    for partial in partials[1:]:
        fold_(into, partial)
    whole = merge_partials([AttentionOutput(p.out.double(), p.lse.double()) for p in partials])
    rounding = 8 * torch.finfo(into.out.dtype).eps
    torch.testing.assert_close(into.out.double(), whole.out, rtol=0, atol=4 * rounding)
    torch.testing.assert_close(into.lse.double(), whole.lse, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("partials", [torch.ones(2, 3), [(torch.ones(3), torch.ones(()))], ["ab"]])
def test_partials_are_attention_outputs(partials):
    with pytest.raises(TypeError, match=r"partials holds a \w+; each must be an AttentionOutput"):
        merge_partials(partials)


def test_partials_are_on_one_device():
    a = AttentionOutput(torch.ones(3), torch.ones(()))
    for b in (
        AttentionOutput(a.out.to("meta"), a.lse.to("meta")),
        a._replace(lse=a.lse.to("meta")),
    ):
        with pytest.raises(ValueError, match="partials are on cpu and meta; they must be on one"):
            merge_partials([a, b])
