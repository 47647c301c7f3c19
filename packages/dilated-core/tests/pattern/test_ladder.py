"""`select_segments` covers any length within any budget of memory."""

import pytest
import torch
from dilated_core import (
    DilatedPattern,
    select_segments,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LONG = [2**10, 2**15 - 1, 2**15, 2**15 + 1, 10**6, 10**9]


def bytes_of_one_query(segments, seq_len, num_heads, head_dim, itemsize):
    """Count what the docstring promises, from the positions of one head's row of a branch."""
    keys = sum(
        len(range(0, min(w, seq_len), r))
        for w, r in zip(segments.segment_lengths, segments.dilation_rates, strict=True)
    )
    return 2 * keys * num_heads * head_dim * itemsize


@pytest.mark.parametrize("keep_every_position", [False, True])
@pytest.mark.parametrize("growth", [2, 3, 4])
@pytest.mark.parametrize("w0", [1, 5, 16])
def test_every_length_is_covered_by_a_geometric_ladder(w0, growth, keep_every_position):
    for seq_len in [*range(1, 201), *LONG]:
        options = {"first_segment_length": w0, "growth": growth}
        segments = select_segments(seq_len, 6, keep_every_position=keep_every_position, **options)
        lengths, rates = segments
        assert lengths == tuple(w0 * growth**i for i in range(len(lengths)))
        assert lengths[-1] >= seq_len
        assert len(lengths) == 1 or lengths[-2] < seq_len
        largest = max(growth**i for i in range(40) if growth**i <= 6)
        if keep_every_position:
            assert rates == tuple(min(growth**i, largest) for i in range(len(rates)))
        else:
            assert rates == tuple(growth**i for i in range(len(rates)))
        assert segments.pattern == DilatedPattern(lengths, rates)
        # Deterministic, and a longer sequence only adds branches.
        longer = select_segments(2 * seq_len, 6, keep_every_position=keep_every_position, **options)
        assert longer.segment_lengths[: len(lengths)] == lengths
        assert longer.dilation_rates[: len(rates)] == rates


@pytest.mark.parametrize("num_heads", range(1, 9))
def test_who_keeps_which_positions(num_heads):
    seq_len = 64
    for keep in (False, True):
        segments = select_segments(
            seq_len, num_heads, first_segment_length=4, keep_every_position=keep
        )
        for w, r in segments.pattern.branches:
            counts = DilatedPattern([w], [r]).materialize(seq_len, num_heads)
            kept = counts.diagonal(dim1=1, dim2=2).sum(0) > 0
            assert kept.all() == (r <= num_heads)
            assert not keep or r <= num_heads


def test_cost_is_as_documented():
    for seq_len in LONG:
        pattern = select_segments(seq_len, 8).pattern
        assert pattern.keys_per_query(seq_len) < 2 * 2048
    for seq_len, factor in ((65_536, 1.3), (2**20, 9)):
        every = select_segments(seq_len, 8, keep_every_position=True).pattern
        ratio = every.keys_per_query(seq_len) / select_segments(seq_len, 8).pattern.keys_per_query(
            seq_len
        )
        assert ratio == pytest.approx(factor, rel=0.05)


@settings(max_examples=200, deadline=None)
@given(
    seq_len=st.integers(1, 3000) | st.sampled_from(LONG),
    w0=st.integers(1, 300),
    growth=st.integers(2, 5),
    keep=st.booleans(),
    budget=st.integers(1, 2**18),
)
def test_a_budget_is_kept_or_refused(seq_len, w0, growth, keep, budget):
    options = {"head_dim": 4, "dtype": torch.float16, "growth": growth, "keep_every_position": keep}

    def choose(w0, budget):
        return select_segments(seq_len, 3, first_segment_length=w0, memory_budget=budget, **options)

    try:
        segments = choose(w0, budget)
    except ValueError as error:
        smallest = int(str(error).rstrip(".").rsplit(" ", 1)[1])
        assert smallest > budget
        # The number named works, and one byte less does not.
        assert bytes_of_one_query(choose(w0, smallest), seq_len, 3, 4, 2) == smallest
        with pytest.raises(ValueError, match=f"need at least {smallest}"):
            choose(w0, smallest - 1)
        return
    assert bytes_of_one_query(segments, seq_len, 3, 4, 2) <= budget
    first = segments.segment_lengths[0]
    halvings = [w0 >> i for i in range(10)]
    assert first in halvings
    for larger in halvings[: halvings.index(first)]:  # halved no more often than needed
        unlimited = select_segments(seq_len, 3, first_segment_length=larger, **options)
        assert bytes_of_one_query(unlimited, seq_len, 3, 4, 2) > budget


def test_a_budget_counts_heads_of_k_and_bytes():
    limit = 2 * 2048 * 2 * 64 * 2
    segments = select_segments(2048, 8, num_kv_heads=2, dtype=torch.bfloat16, memory_budget=limit)
    assert segments == ((2048,), (1,))
    assert len(select_segments(2048, 8, dtype=torch.bfloat16, memory_budget=limit)[0]) > 1
    assert len(select_segments(2048, 8, num_kv_heads=2, memory_budget=limit)[0]) > 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seq_len": 0}, ValueError, "seq_len is 0; it must be at least 1"),
        ({"seq_len": 10.0}, TypeError, "seq_len is 10.0; it must be an integer"),
        ({"num_heads": 0}, ValueError, "num_heads is 0; it must be at least 1"),
        ({"num_kv_heads": 0}, ValueError, "num_kv_heads is 0; it must be at least 1"),
        ({"growth": 1}, ValueError, "growth is 1; it must be at least 2"),
        ({"first_segment_length": True}, TypeError, "first_segment_length is True; it must be an"),
        ({"head_dim": 0}, ValueError, "head_dim is 0; it must be at least 1"),
        ({"memory_budget": 0}, ValueError, "memory_budget is 0; it must be at least 1"),
        ({"memory_budget": 1e9}, TypeError, "memory_budget is 1000000000.0; it must be an integer"),
        ({"keep_every_position": 1}, TypeError, "keep_every_position is 1; it must be True or"),
        (
            {"dtype": torch.int8},
            TypeError,
            "dtype is torch.int8; it must be a floating-point",
        ),
        ({"dtype": "float32"}, TypeError, "dtype is 'float32'; it must be a floating-point dtype"),
        ({"num_kv_heads": 3}, ValueError, "num_heads is 2 and num_kv_heads 3; num_kv_heads must"),
    ],
)
def test_mistakes(arguments, error, message):
    with pytest.raises(error, match=message):
        select_segments(**{"seq_len": 10, "num_heads": 2, **arguments})
