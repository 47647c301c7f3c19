"""`attention_rows` against the oracle's own probabilities, and what it costs in long sequences."""

import math

import pytest
import torch
from dilated_core import DilatedPattern, dilated_attention, reference_dilated_attention
from dilated_core.inspection.attention_rows import attention_rows
from dilated_core.testing import random_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

PATTERN = DilatedPattern([8, 24, 40], [1, 3, 4])


def oracle_rows(q, k, pattern, rows, **options):
    """Dense `(B, H, N, S)`: with the identity for v, the output is the probabilities."""
    S, H_kv = k.shape[1:3]
    identity = torch.eye(S, dtype=torch.float64)[None, :, None].expand(len(k), S, H_kv, S)
    dense = reference_dilated_attention(q, k, identity, pattern, **options)
    return dense[:, list(rows)].transpose(1, 2)


def scattered(result, S):
    """The rows as dense `(B, H, N, S)`."""
    positions, probabilities = result
    assert (probabilities.masked_select(positions == -1) == 0).all()
    dense = probabilities.new_zeros(*probabilities.shape[:3], S + 1)
    index = positions.masked_fill(positions == -1, S).expand_as(probabilities)
    return dense.scatter_add(-1, index, probabilities)[..., :S]


def assert_well_formed(positions):
    """Ascending, each position once, −1 only at the end, and no column that is −1 everywhere."""
    ahead, behind = positions[..., 1:], positions[..., :-1]
    assert ((ahead > behind) | (ahead == -1)).all()
    assert not positions.shape[-1] or (positions[..., -1] >= 0).any()


@settings(max_examples=150, deadline=None)
@given(random_cases(max_seq_len=40), st.data())
def test_any_rows_of_any_pattern_match_the_oracle(case, data):
    q, k, _, _ = case.tensors(dtype=torch.float64)
    S = case.seq_len
    rows = data.draw(st.lists(st.integers(0, S - 1), min_size=1, max_size=6))
    mask = None
    if data.draw(st.booleans()):
        share = data.draw(st.sampled_from([0.2, 0.7, 1.0]))
        mask = torch.rand(case.batch_size, S, generator=torch.Generator().manual_seed(3)) < share
    options = {"is_causal": case.is_causal, "scale": case.scale, "key_padding_mask": mask}
    result = attention_rows(q, k, case.pattern, rows, **options)
    assert_well_formed(result.positions)
    want = oracle_rows(q, k, case.pattern, rows, **options)
    torch.testing.assert_close(scattered(result, S), want, rtol=0, atol=1e-12)


def test_the_rows_times_v_are_the_attention():
    q, k, v = torch.randn(3, 2, 61, 6, 8).unbind()
    positions, probabilities = attention_rows(q, k, PATTERN, range(61), is_causal=True)
    assert probabilities.dtype == torch.float32
    seen = v[:, positions.clamp(min=0), torch.arange(6)[:, None, None]]
    out = torch.einsum("bhnk,bhnkd->bnhd", probabilities, seen)
    expected = dilated_attention(q, k, v, PATTERN, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_what_is_missing_to_one_is_the_share_of_zero_keys():
    pattern = DilatedPattern([10], [1], padding="attended")
    q = torch.zeros(1, 13, 2, 4)
    positions, probabilities = attention_rows(q, q, pattern, [4, 11])
    assert positions[0].tolist() == [[*range(10)], [10, 11, 12] + [-1] * 7]
    torch.testing.assert_close(probabilities.sum(-1), torch.tensor([[[1, 0.3], [1, 0.3]]]))


def test_very_negative_scores_beside_zero_keys_and_alone():
    """exp(200) is beyond float32: a row's zero keys, if it has any, have to set the shift."""
    pattern = DilatedPattern([10], [1], padding="attended")
    q = torch.full((1, 13, 1, 1), 100.0, requires_grad=True)
    _, probabilities = attention_rows(q, -q.detach(), pattern, [1, 11], scale=0.02)
    (dq,) = torch.autograd.grad(probabilities[..., 0].sum(), q)
    torch.testing.assert_close(probabilities[0, 0, 0], torch.full((10,), 0.1))
    assert (probabilities[0, 0, 1] == 0).all()
    torch.testing.assert_close(dq, torch.zeros_like(dq), rtol=0, atol=1e-6)


def test_rows_that_see_nothing_are_zero():
    pattern = DilatedPattern([8], [4])
    q, k = torch.randn(2, 1, 16, 2, 4, requires_grad=True).unbind()
    positions, probabilities = attention_rows(q, k, pattern, [0, 3, 9])
    assert (positions[:, 1] == -1).all()
    assert (probabilities[:, :, 1] == 0).all()
    assert positions[0, 0].tolist() == [0, 4]
    assert attention_rows(q, k, pattern, [3, 7]).probabilities.shape == (1, 2, 2, 0)
    everything = torch.ones(1, 16, dtype=torch.bool)
    masked = attention_rows(q, k, pattern, [0, 3, 9], key_padding_mask=everything)
    assert (masked.probabilities == 0).all()
    assert torch.equal(masked.positions, positions)
    (dk,) = torch.autograd.grad(masked.probabilities.sum(), k)
    assert (dk == 0).all()


def test_the_orders_of_rows_and_their_types():
    q, k = torch.randn(2, 2, 30, 4, 8).unbind()
    want = attention_rows(q, k, PATTERN, [29, 0, 7, 7])
    for rows in (torch.tensor([29, 0, 7, 7]), torch.tensor([29, 0, 7, 7], dtype=torch.uint8)):
        got = attention_rows(q, k, PATTERN, rows)
        assert torch.equal(got.positions, want.positions)
        assert torch.equal(got.probabilities, want.probabilities)
    for rows in ([], torch.tensor([], dtype=torch.int64), range(0)):
        got = attention_rows(q, k, PATTERN, rows)
        assert got.positions.shape == (4, 0, 0)
        assert got.probabilities.shape == (2, 4, 0, 0)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4), (2, 5, 0, 4)])
def test_nothing_in_nothing_out(shape):
    rows = [1] if shape[1] else []
    q = torch.randn(shape)
    positions, probabilities = attention_rows(q, q, PATTERN, rows)
    assert positions.shape[:2] == (shape[2], len(rows))
    assert probabilities.shape == (shape[0], *positions.shape)


def test_many_rows_are_gathered_in_several_parts(monkeypatch):
    q, k = torch.randn(2, 2, 30, 4, 8).unbind()
    mask = torch.rand(2, 30) < 0.3
    whole = attention_rows(q, k, PATTERN, range(30), key_padding_mask=mask)
    # 2 · 4 heads · K · 8 elements of k per row.
    elements = 7 * 2 * 4 * whole.positions.shape[-1] * 8
    monkeypatch.setattr("dilated_core.inspection.attention_rows._GATHERED_ELEMENTS", elements)
    with LargestResult() as mode:
        parts = attention_rows(q, k, PATTERN, range(30), key_padding_mask=mask)
    assert mode.elements == elements
    assert torch.equal(parts.positions, whole.positions)
    torch.testing.assert_close(parts.probabilities, whole.probabilities, rtol=0, atol=1e-6)


def test_gradcheck():
    q, k = torch.randn(2, 2, 9, 2, 3, dtype=torch.float64, requires_grad=True).unbind()
    pattern = DilatedPattern([4, 9], [1, 2], padding="attended")
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 4:] = True

    def probabilities(q, k):
        return attention_rows(q, k, pattern, [0, 8, 5], key_padding_mask=mask).probabilities

    assert torch.autograd.gradcheck(probabilities, (q, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_inputs_are_computed_in_float32(dtype, autocast):
    q, k = torch.randn(2, 1, 40, 3, 16).to(dtype).unbind()
    with torch.autocast("cpu", dtype, enabled=autocast):
        got = attention_rows(q, k, PATTERN, range(40), scale=0.7)
    assert got.probabilities.dtype == torch.float32
    want = oracle_rows(q, k, PATTERN, range(40), scale=0.7)
    torch.testing.assert_close(scattered(got, 40), want.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("is_causal", [False, True])
def test_a_masked_key_may_hold_anything(is_causal, value):
    """Key 0 too, which is what the gather reads where a row has no more keys."""
    mask = torch.zeros(2, 61, dtype=torch.bool)
    mask[0, :5] = mask[1, 30:40] = mask[1, 0] = True
    q, k = torch.randn(2, 2, 61, 3, 8, dtype=torch.float64).unbind()
    k = k.masked_fill(mask[..., None, None], 0).requires_grad_()
    q.requires_grad_()
    poisoned = k.detach().masked_fill(mask[..., None, None], value).requires_grad_()
    options = {"rows": range(61), "is_causal": is_causal, "key_padding_mask": mask}
    clean = attention_rows(q, k, PATTERN, **options)
    got = attention_rows(q, poisoned, PATTERN, **options)
    assert torch.equal(got.probabilities, clean.probabilities)
    gradient = torch.randn_like(clean.probabilities)
    want = torch.autograd.grad(clean.probabilities, (q, k), gradient)
    have = torch.autograd.grad(got.probabilities, (q, poisoned), gradient)
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)
    assert not have[1][mask].any()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_key_that_a_row_does_not_see_may_hold_anything(value):
    q, k = torch.randn(2, 1, 24, 2, 4, dtype=torch.float64).unbind()
    k[:, 0] = value  # in the first segment only
    q, k = q.requires_grad_(), k.requires_grad_()
    positions, probabilities = attention_rows(q, k, DilatedPattern([8, 6], [1, 2]), [9, 20])
    assert (positions == -1).any()
    dq, dk = torch.autograd.grad(probabilities, (q, k), torch.randn_like(probabilities))
    assert probabilities.isfinite().all()
    assert dq.isfinite().all()
    assert not dk[:, 0].any()


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: x[:1].expand(2, -1, -1, -1),
        lambda x: x.flatten()[: 60 + 8].unfold(0, 8, 1)[None, :, None].expand(2, -1, 3, -1),
        lambda x: x.flip(-1)[..., ::2].repeat(1, 1, 1, 2),
    ],
    ids=["heads first", "expanded", "overlapping", "copied"],
)
def test_any_strides(strided):
    q, k = (strided(x) for x in torch.randn(2, 2, 61, 3, 8, dtype=torch.float64).unbind())
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    copies = [
        x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in (q, k)
    ]
    got, want = (attention_rows(*pair, PATTERN, range(0, 61, 3)) for pair in (leaves, copies))
    assert torch.equal(got.probabilities, want.probabilities)
    gradient = torch.randn_like(want.probabilities)
    for a, b in zip(
        torch.autograd.grad(got.probabilities, leaves, gradient),
        torch.autograd.grad(want.probabilities, copies, gradient),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("head_offsets", ["interleaved", "blocked"])
def test_a_range_of_heads_is_a_slice_of_all(head_offsets):
    pattern = DilatedPattern([8, 24, 40], [1, 3, 4], head_offsets=head_offsets)
    q, k = torch.randn(2, 1, 61, 12, 8).unbind()
    whole = attention_rows(q, k, pattern, range(61))
    for first, stop in ((0, 3), (3, 8), (7, 12)):
        part = attention_rows(
            q[:, :, first:stop], k[:, :, first:stop], pattern, range(61), head_range=(first, 12)
        )
        dense = scattered(whole, 61)[:, first:stop]
        torch.testing.assert_close(scattered(part, 61), dense, rtol=0, atol=1e-7)
    # Heads of k and v are shared within the range: here 6 heads of q by 2.
    grouped = attention_rows(q, k[:, :, ::3], pattern, range(61))
    part = attention_rows(q[:, :, 6:], k[:, :, 6::3], pattern, range(61), head_range=(6, 12))
    dense = scattered(grouped, 61)[:, 6:]
    torch.testing.assert_close(scattered(part, 61), dense, rtol=0, atol=1e-7)


def test_index_tensors_are_on_the_device_of_the_data():
    q, k = torch.randn(2, 1, 61, 3, 8).unbind()
    want = attention_rows(q, k, PATTERN, [3, 60])
    with torch.device("meta"):  # what torch.set_default_device("meta") does
        got = attention_rows(q, k, PATTERN, [3, 60])
    assert torch.equal(got.positions, want.positions)
    assert torch.equal(got.probabilities, want.probabilities)
    shapes = attention_rows(q.to("meta"), k.to("meta"), PATTERN, [3, 60])
    assert shapes.positions.shape == want.positions.shape
    assert shapes.probabilities.device.type == "meta"
    assert shapes.probabilities.shape == want.probabilities.shape


def test_lengths_and_rates_beyond_64_bits():
    q, k = torch.randn(2, 1, 20, 3, 8).unbind()
    got = attention_rows(q, k, DilatedPattern([2**70, 2**80], [1, 2**65]), range(20))
    want = attention_rows(q, k, DilatedPattern([20, 20], [1, 20]), range(20))
    assert torch.equal(got.positions, want.positions)
    assert torch.equal(got.probabilities, want.probabilities)


class LargestResult(TorchDispatchMode):
    """Notes the most elements that an operator had to write or to look at."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result._is_view():
            self.elements = max(self.elements, result.numel())
        return result


def test_cost_does_not_grow_with_the_sequence():
    """10⁹ positions in one value each: whatever touched them all would run out of memory."""
    S = 10**9
    pattern = DilatedPattern([64, 512, 10**7], [1, 8, 10**5])
    q, k = (torch.ones(1).expand(2, S, 4, 16) for _ in range(2))
    mask = torch.zeros(1, 1, dtype=torch.bool).expand(2, S)
    with LargestResult() as mode:
        positions, probabilities = attention_rows(
            q, k, pattern, [0, S - 1, S // 2], is_causal=True, key_padding_mask=mask
        )
    assert positions.shape[:2] == (4, 3)
    assert positions.max() == S - 1
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(2, 4, 3))
    # B · H · N · (at most 64 + 64 + 100 keys) · D
    assert mode.elements <= 2 * 4 * 3 * (64 + 64 + 100) * 16


Q = torch.zeros(2, 8, 4, 6)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "pattern is a tuple", {"pattern": (4, 2)}),
        (TypeError, "q is a list; it must be a tensor", {"q": [1.0]}),
        (ValueError, r"k has shape \(8, 4, 6\); it must have the four", {"k": Q[0]}),
        (ValueError, "q and k have shapes", {"k": Q[:, :5]}),
        (ValueError, "q has 4 heads and k 3; the heads of k must divide", {"k": Q[:, :, :3]}),
        (ValueError, "q has 4 heads and k 0", {"k": Q[:, :, :0]}),
        (TypeError, "q and k have dtypes torch.float32 and torch.float16", {"k": Q.half()}),
        (TypeError, "dtype torch.int64; it must be a floating", {"q": Q.long(), "k": Q.long()}),
        (ValueError, "q and k are on cpu and meta", {"k": Q.to("meta")}),
        (ValueError, "head_dim must be at least 1", {"q": Q[..., :0], "k": Q[..., :0]}),
        (TypeError, "rows is a int; it must be", {"rows": 3}),
        (TypeError, "rows is a str; it must be", {"rows": "3"}),
        (TypeError, "an entry of rows is 1.0; it must be an integer", {"rows": [1.0]}),
        (TypeError, "an entry of rows is True; it must be an integer", {"rows": [True]}),
        (TypeError, "is_causal is 'False'; it must be True or False", {"is_causal": "False"}),
        (TypeError, "is_causal is None; it must be True or False", {"is_causal": None}),
        (TypeError, "attention_rows has no argument 'causal'; it is called is_c", {"causal": True}),
        (TypeError, "no argument 'softmax_scale'; it is called scale", {"softmax_scale": 1.0}),
        (ValueError, r"head_range is \(1, 4\) and there are 4 heads", {"head_range": (1, 4)}),
        (TypeError, "rows has dtype torch.bool", {"rows": torch.ones(8, dtype=torch.bool)}),
        (TypeError, "rows has dtype torch.float32", {"rows": torch.ones(2)}),
        (ValueError, r"rows has shape \(\); it must have one", {"rows": torch.tensor(3)}),
        (ValueError, r"rows holds -1; each must be in \[0, S\), here S = 8", {"rows": [3, -1]}),
        (ValueError, "rows holds 8", {"rows": torch.tensor([0, 8])}),
        (TypeError, "scale is '1'", {"scale": "1"}),
        (ValueError, "scale is inf", {"scale": math.inf}),
        (TypeError, "key_padding_mask is a list", {"key_padding_mask": [True]}),
        (TypeError, "key_padding_mask has dtype", {"key_padding_mask": torch.zeros(2, 8)}),
        (
            ValueError,
            "key_padding_mask has shape",
            {"key_padding_mask": torch.zeros(2, 7, dtype=torch.bool)},
        ),
    ],
)
def test_user_errors(error, message, changes):
    arguments = {"q": Q, "k": Q, "pattern": DilatedPattern([4], [2]), "rows": [1]} | changes
    with pytest.raises(error, match=message):
        attention_rows(**arguments)
