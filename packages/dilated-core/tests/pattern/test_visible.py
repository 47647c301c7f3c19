"""Position arithmetic selects the keys of the definition, in sequences of any length."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.pattern.visible import VisibleKeys, visible_keys
from dilated_core.reference import _counts
from dilated_core.testing import AWKWARD_CASES, Case, random_cases
from hypothesis import given, settings

PLAIN_CASES = [case for case in AWKWARD_CASES if not getattr(case, "documents", ())]


def check_against_the_definition(case: Case) -> None:
    S, H = case.seq_len, case.num_heads
    want, want_zero_keys = _counts(case.pattern, S, H, torch.device("cpu"), case.is_causal)
    got = torch.zeros_like(want)
    got_zero_keys = torch.zeros_like(want_zero_keys)
    for head in range(H):
        for position in range(S):
            seen = visible_keys(
                case.pattern, position, head, num_heads=H, seq_len=S, is_causal=case.is_causal
            )
            assert len(seen.positions) == len(case.pattern.branches)
            for keys in seen.positions:
                got[head, position, list(keys)] += 1
            got_zero_keys[head, position] = seen.zero_keys
    assert torch.equal(got, want)
    assert torch.equal(got_zero_keys, want_zero_keys)


@pytest.mark.parametrize("case", PLAIN_CASES, ids=lambda case: case.name)
def test_awkward_cases_match_the_definition(case):
    check_against_the_definition(case)


@settings(max_examples=100, deadline=None)
@given(random_cases(max_seq_len=40))
def test_any_pattern_matches_the_definition(case):
    check_against_the_definition(case)


def test_a_billion_positions_cost_nothing():
    pattern = DilatedPattern([10**6, 10**9], [1, 10**5], padding="attended")
    seen = visible_keys(pattern, 10**9 - 5, 99_995, num_heads=10**5, seq_len=10**9)
    dense, dilated = range(999_000_000, 10**9), range(99_995, 10**9, 10**5)
    assert seen == VisibleKeys((dense, dilated), 0)
    seen = visible_keys(pattern, 2_000_000, 0, num_heads=4, seq_len=2_000_003)
    assert seen.positions[0] == range(2_000_000, 2_000_003)
    # The first branch lacks 999 997 of its 10⁶ keys; the second is clipped to the sequence.
    assert seen.positions[1] == range(0, 2_000_003, 10**5)
    assert seen.zero_keys == 999_997


@pytest.mark.parametrize("n", [2**63, 2**100])
def test_sequences_lengths_and_rates_of_any_size(n):
    pattern = DilatedPattern([n, n, 8, 3 * n], [1, n, n, 4], padding="attended")
    seen = visible_keys(pattern, n - 7, 1, num_heads=4, seq_len=n)
    assert seen.positions == (range(n), range(0), range(n - 7, n, n), range(1, n, 4))
    assert seen.zero_keys == 0
    # The second segment of n is short of all but 5 keys, and the query is the third of them.
    two = DilatedPattern([n], [1], padding="attended")
    seen = visible_keys(two, n + 2, 0, num_heads=1, seq_len=n + 5)
    assert seen == VisibleKeys((range(n, n + 5),), n - 5)
    assert visible_keys(two, n + 2, 0, num_heads=1, seq_len=n + 5, is_causal=True) == VisibleKeys(
        (range(n, n + 3),), 0
    )


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "pattern is a list", {"pattern": [1, 2]}),
        (TypeError, "position is 1.0; it must be an integer", {"position": 1.0}),
        (TypeError, "is_causal is 'False'; it must be True or False", {"is_causal": "False"}),
        (TypeError, "is_causal is None; it must be True or False", {"is_causal": None}),
        (TypeError, "head is True", {"head": True}),
        (TypeError, "seq_len is None", {"seq_len": None}),
        (TypeError, "num_heads is '2'", {"num_heads": "2"}),
        (ValueError, r"position is -1; it must be in \[0, seq_len\), here 8", {"position": -1}),
        (ValueError, "position is 8", {"position": 8}),
        (ValueError, r"head is 2; it must be in \[0, num_heads\), here 2", {"head": 2}),
        (ValueError, "position is 0", {"position": 0, "seq_len": 0}),
    ],
)
def test_user_errors(error, message, changes):
    arguments = {
        "pattern": DilatedPattern([4], [2]),
        "position": 3,
        "head": 1,
        "num_heads": 2,
        "seq_len": 8,
    } | changes
    with pytest.raises(error, match=message):
        visible_keys(**arguments)
