"""A pattern checks its numbers, and counts the keys that its definition selects, at any size."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from dilated_core import Branch, DilatedPattern, select_segments
from dilated_core.pattern.branches import clip_pattern, head_offset, kept_rows
from dilated_core.pattern.visible import visible_keys
from dilated_core.testing import random_cases
from hypothesis import given, settings
from hypothesis import strategies as st


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
        ([4, 0], [1, 2], {}, ValueError, r"segment_lengths\[1\] is 0; it must be at least 1"),
        ([4], [-3], {}, ValueError, r"dilation_rates\[0\] is -3; it must be at least 1"),
        ([4.0], [1], {}, TypeError, r"segment_lengths\[0\] is 4.0; it must be an integer"),
        ([True], [1], {}, TypeError, r"segment_lengths\[0\] is True; it must be an integer"),
        (["4"], [1], {}, TypeError, r"segment_lengths\[0\] is '4'; it must be an integer"),
        ("48", [1], {}, TypeError, "segment_lengths is '48'; give a list of integers"),
        ({4: 1}, [1], {}, TypeError, r"segment_lengths is \{4: 1\}; give a list of integers"),
        ([4], {1}, {}, TypeError, r"dilation_rates is \{1\}; give a list of integers"),
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


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("segment_length", "it is called segment_lengths"),
        ("dilation_rate", "it is called dilation_rates"),
        ("is_causal", "it is passed to dilated_attention"),
        ("softmax_scale", "it is called scale, and is passed to dilated_attention"),
        ("depth", "its arguments are segment_lengths, dilation_rates, head_offsets, padding"),
    ],
)
def test_an_unknown_name_is_answered_with_the_right_one(name, answer):
    with pytest.raises(TypeError, match=f"^DilatedPattern has no argument '{name}'; {answer}"):
        DilatedPattern(**{name: [4], "dilation_rates": [1]})


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


def keys_per_query_by_the_loop(pattern, seq_len):
    """Every offset of every segment, as the definition has it."""
    pairs = Fraction(0)
    for w, r in pattern.branches:
        for start in range(0, seq_len, w):
            for offset in range(r):
                kept = len(range(start + offset, min(start + w, seq_len), r))
                pairs += Fraction(kept**2, r)
    return float(pairs / seq_len)


@settings(max_examples=200, deadline=None)
@given(
    branches=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 80)), min_size=1, max_size=4),
    seq_len=st.integers(1, 90),
)
def test_keys_per_query_is_exactly_the_loop_over_offsets(branches, seq_len):
    pattern = DilatedPattern(*zip(*branches, strict=True))
    assert pattern.keys_per_query(seq_len) == keys_per_query_by_the_loop(pattern, seq_len)


@pytest.mark.parametrize("exponent", [63, 100])
def test_arithmetic_takes_no_time_proportional_to_lengths_or_rates(exponent):
    """Otherwise it would not end in a lifetime."""
    n = 2**exponent
    pattern = DilatedPattern([n, n, n - 1], [1, n, n - 3])
    # Dense: n keys. One kept position a head: 1/n. The last: n − 3 pairs of one row and, for the
    # two offsets that keep two, 2 · 4 − 2 more of n − 1 positions, and one of the position left.
    last = Fraction((n - 3) - 2 + 2 * 4 + 1, (n - 3) * n)
    assert pattern.keys_per_query(n) == float(n + Fraction(1, n) + last)
    assert pattern.flops(n, 4, 1, is_causal=True) == 4 * (4 * n * (n + 1) // 2 + 4 + 2 * 3 + 2 + 1)
    segments = select_segments(n, 4, first_segment_length=n)
    assert segments == ((n,), (1,))
    assert len(select_segments(n, 4, first_segment_length=1).segment_lengths) == exponent + 1


@settings(max_examples=100, deadline=None)
@given(case=random_cases(max_seq_len=30), power=st.sampled_from([0, 63, 100]))
def test_a_clipped_pattern_selects_the_same_keys(case, power):
    S, H = case.seq_len, case.num_heads
    lengths, rates = (
        [n if i % 2 else n * 2**power for i, n in enumerate(numbers)]
        for numbers in (case.pattern.segment_lengths, case.pattern.dilation_rates)
    )
    options = {"head_offsets": case.pattern.head_offsets}
    pattern = DilatedPattern(lengths, rates, **options)
    clipped = clip_pattern(pattern, S, H)
    assert clipped.head_offsets == pattern.head_offsets
    assert max(*clipped.segment_lengths, *clipped.dilation_rates) <= max(S, H)
    for head in range(H):
        for position in range(S):
            want, got = (
                visible_keys(p, position, head, num_heads=H, seq_len=S).positions
                for p in (pattern, clipped)
            )
            assert [list(keys) for keys in got] == [list(keys) for keys in want]
    assert torch.equal(pattern.materialize(S, H), clipped.materialize(S, H))


@pytest.mark.parametrize("n", [2**63, 2**100])
def test_counts_of_huge_lengths_and_rates(n):
    counts = DilatedPattern([n, n, 4], [1, n, n]).materialize(6, 3)
    whole, at_offset = torch.ones(6, 6), torch.zeros(3, 6, 6)
    for head in range(3):
        at_offset[head, head, head] += 2
    at_offset[0, 4, 4] += 1  # the second segment of 4 has the positions 4 and 5
    at_offset[1, 5, 5] += 1
    assert torch.equal(counts, (whole + at_offset).long())


def test_counts_are_on_the_cpu_whatever_the_default_device():
    pattern = DilatedPattern([4, 8], [1, 2])
    torch.set_default_device("meta")
    try:
        counts = pattern.materialize(8, 2)
    finally:
        torch.set_default_device(None)
    assert torch.equal(counts, pattern.materialize(8, 2))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.materialize(-1, 2), ValueError, "seq_len is -1; it must be at least 0"),
        (lambda p: p.materialize(4, 2.0), TypeError, "num_heads is 2.0; it must be an integer"),
        (
            lambda p: p.materialize(4, 2, is_causal="False"),
            TypeError,
            "is_causal is 'False'; it must be",
        ),
        (lambda p: p.keys_per_query(4.0), TypeError, "seq_len is 4.0; it must be an integer"),
        (lambda p: p.flops(-1, 2, 3), ValueError, "seq_len is -1; it must be at least 0"),
        (lambda p: p.flops(4, 0, 3), ValueError, "num_heads is 0; it must be at least 1"),
        (lambda p: p.flops(4, 2, True), TypeError, "head_dim is True; it must be an integer"),
        (
            lambda p: p.flops(4, 2, 3, batch_size=1.5),
            TypeError,
            "batch_size is 1.5; it must be an integer",
        ),
        (
            lambda p: p.flops(4, 2, 3, is_causal=None),
            TypeError,
            "is_causal is None; it must be True or",
        ),
        (
            lambda p: p.flops(4, 2, 3, backward=1),
            TypeError,
            "backward is 1; it must be True or False",
        ),
    ],
)
def test_mistakes_in_a_question(call, error, message):
    with pytest.raises(error, match=message):
        call(DilatedPattern([4], [2]))
