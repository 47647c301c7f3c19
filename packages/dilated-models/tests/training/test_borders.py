"""Distances from a border against the pattern itself, and the note about them."""

import pytest
from dilated_core import DilatedPattern
from dilated_models.training.borders import border_note, distances_from_border
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=100, deadline=None)
@given(
    branches=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3)), min_size=1, max_size=4),
    seq_len=st.integers(1, 40),
)
def test_distances_are_those_of_the_pattern(branches, seq_len):
    """The run of keys before each query in the pattern of rate 1 alone."""
    lengths, rates = zip(*branches, strict=True)
    distances = distances_from_border(DilatedPattern(lengths, rates), seq_len)
    undilated = [w for w, r in branches if r == 1]
    if not undilated:
        assert distances is None
        return
    seen = DilatedPattern(undilated, [1] * len(undilated)).materialize(seq_len, 1, is_causal=True)[
        0
    ]
    runs = [
        int(seen[query, : query + 1].flip(0).bool().long().cumprod(0).sum())
        for query in range(seq_len)
    ]
    expected = [run - 1 for run in runs]  # a query sees itself
    if expected == list(range(seq_len)):
        assert distances is None
    else:
        assert distances.tolist() == expected


@pytest.mark.parametrize(
    ("lengths", "rates", "is_blind"),
    [
        ((64, 256), (1, 4), True),
        ((64, 96, 256), (1, 1, 4), False),  # borders at 64, 128, 192 and at 96, 192: both at 192
        ((256, 256), (1, 4), False),
        ((128, 256), (2, 4), False),  # no branch of rate 1, so no query is unlike the others
        ((64, 64), (1, 1), True),
    ],
)
def test_the_note(lengths, rates, is_blind):
    seq_len = 190
    note = border_note(DilatedPattern(lengths, rates), seq_len)
    assert (note is not None) == is_blind
    if note is not None:
        assert "segments of 64 tokens" in note
        assert "such as 96/1" in note


def test_two_branches_with_a_common_border_are_blind_there():
    assert border_note(DilatedPattern((64, 96), (1, 1)), 192) is None
    assert "segments of 96 tokens" in str(border_note(DilatedPattern((64, 96), (1, 1)), 193))
