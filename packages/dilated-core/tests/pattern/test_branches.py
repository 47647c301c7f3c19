import copy
import pickle

import pytest
import torch
from dilated_core import Branch, DilatedPattern
from dilated_core.pattern.branches import head_offset, kept_rows
from dilated_core.testing import random_cases
from hypothesis import given, settings


def test_branches_keep_their_order():
    pattern = DilatedPattern([8, 4], (2, 1))
    assert pattern.branches == (Branch(8, 2), Branch(4, 1))
    assert pattern.segment_lengths == (8, 4)


def test_equal_patterns_are_one_key():
    a, b = DilatedPattern([4, 8], [1, 2]), DilatedPattern((4, 8), (1, 2))
    assert a == b
    assert len({a, b, DilatedPattern([4, 8], [1, 2], padding="attended")}) == 2


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))]
)
def test_copies(again):
    pattern = DilatedPattern([4, 8], [1, 2], head_offsets="blocked")
    assert again(pattern) == pattern
    assert eval(repr(pattern)) == pattern


def test_immutable():
    with pytest.raises(AttributeError):
        DilatedPattern([4], [1]).padding = "attended"


@pytest.mark.parametrize(
    ("lengths", "rates", "options", "error", "message"),
    [
        ([], [], {}, ValueError, "segment_lengths is empty; a pattern needs at least one branch"),
        ([4], [], {}, ValueError, "dilation_rates is empty"),
        ([4, 8], [1], {}, ValueError, "segment_lengths has 2 entries and dilation_rates 1; each"),
        ([4, 0], [1, 2], {}, ValueError, "segment_lengths holds 0; each value must be at least 1"),
        ([4], [-3], {}, ValueError, "dilation_rates holds -3; each value must be at least 1"),
        ([4.0], [1], {}, TypeError, "segment_lengths holds 4.0, which is not an integer"),
        ([True], [1], {}, TypeError, "segment_lengths holds True, which is not an integer"),
        (["4"], [1], {}, TypeError, "segment_lengths holds '4', which is not an integer"),
        ("48", [1], {}, TypeError, "segment_lengths is '48'; give a list of integers"),
        (4, [1], {}, TypeError, "segment_lengths is 4; give a list of integers"),
        ([4], [1], {"head_offsets": "mod"}, ValueError, "head_offsets is 'mod'; it must be one of "
         "'interleaved', 'blocked'"),
        ([4], [1], {"padding": "zero"}, ValueError, "padding is 'zero'; it must be one of "
         "'masked', 'attended'"),
    ],
)  # fmt: skip
def test_mistakes(lengths, rates, options, error, message):
    with pytest.raises(error, match=message):
        DilatedPattern(lengths, rates, **options)


def test_head_offsets_of_paper_and_published_code():
    # 12 heads, r = 4 and 8 heads, r = 3: as measured on the published code.
    blocked = [head_offset(h, 4, 12, "blocked") for h in range(12)]
    assert blocked == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert [head_offset(h, 3, 8, "blocked") for h in range(8)] == [0, 0, 0, 1, 1, 1, 2, 2]
    assert [head_offset(h, 3, 8, "interleaved") for h in range(8)] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_kept_rows_counts_a_range():
    for length in range(20):
        for rate in range(1, 8):
            for offset in range(rate):
                expected = len(range(offset, length, rate)) if offset < length else 0
                assert kept_rows(length, rate, offset) == expected


def test_materialize_by_hand():
    pattern = DilatedPattern([2, 4], [1, 2])
    assert pattern.materialize(5, 2).tolist() == [
        [[2, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 2, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 2]],
        [[1, 1, 0, 0, 0], [1, 2, 0, 1, 0], [0, 0, 1, 1, 0], [0, 1, 1, 2, 0], [0, 0, 0, 0, 1]],
    ]
    causal = pattern.materialize(5, 2, is_causal=True)
    assert torch.equal(causal, pattern.materialize(5, 2).tril())


@settings(max_examples=50, deadline=None)
@given(case=random_cases(max_seq_len=40))
def test_counts_agree_with_the_dense_matrix(case):
    S, H, D = case.seq_len, case.num_heads, 3
    dense = case.pattern.materialize(S, H, is_causal=case.is_causal)
    flops = case.pattern.flops(S, H, D, batch_size=2, is_causal=case.is_causal)
    assert flops == 2 * 4 * D * dense.sum().item()
    assert case.pattern.flops(S, H, D, is_causal=case.is_causal, backward=True) * 4 == flops * 5
    # Over a number of heads that every rate divides, the mean is exact for interleaved offsets.
    cycle = torch.tensor(case.pattern.dilation_rates).unique()
    heads = 1
    for rate in cycle.tolist():
        heads *= rate
    if heads <= 64:
        full = DilatedPattern(case.pattern.segment_lengths, case.pattern.dilation_rates)
        mean = full.materialize(S, heads).sum().item() / (S * heads)
        assert full.keys_per_query(S) == pytest.approx(mean, rel=1e-12)


def test_keys_per_query_is_the_papers_sum():
    pattern = DilatedPattern([2048, 4096, 8192], [1, 2, 4])
    assert pattern.keys_per_query(8192) == 2048 + 4096 / 4 + 8192 / 16
    with pytest.raises(ValueError, match="seq_len is 0; it must be at least 1"):
        pattern.keys_per_query(0)
