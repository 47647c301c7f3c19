"""Local problems and hops together are the pattern: no pair is missing, and none is twice."""

from collections import Counter
from collections.abc import Iterator

import pytest
from dilated_core import Problem, Rows, Span, plan_problems, visible_keys
from dilated_core.testing.cases import Case, random_cases
from dilated_ring.layout import spans_of_ranks
from dilated_ring.plan.exchange import Exchange, plan_exchange
from dilated_ring.plan.parcels import Heads, kept_of_part, parcel_problems
from dilated_ring.plan.parts import in_parts
from dilated_ring.plan.sequences import cut_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

Cells = list[list[tuple[int, int]]]
"""For each head of a view, (row, head) of the tensor in the order of its rows."""


def cells(rows: Rows) -> Iterator[Cells]:
    """What each segment of a view holds."""
    for segment in range(rows.num_segments):
        start = rows.start + segment * rows.segment_length
        yield [
            [
                (start + h * rows.offset_step + i * rows.rate, rows.first_head + h * rows.head_step)
                for i in range(rows.num_rows)
            ]
            for h in range(rows.num_heads)
        ]


def count(problem: Problem, first_query: int, key_of, pairs: Counter, zeros: Counter) -> None:
    """Add the pairs of a problem, as (head, query, head of k, key), and its zero keys."""
    for queries, keys in zip(cells(problem.queries), cells(problem.keys), strict=True):
        group = len(queries) // len(keys)
        for h, rows in enumerate(queries):
            for i, (row, head) in enumerate(rows):
                zeros[head, first_query + row] += problem.zero_keys
                for j, cell in enumerate(keys[h // group]):
                    if not problem.is_causal or j <= i:
                        key, kv_head = key_of(cell)
                        pairs[head, first_query + row, kv_head, key] += 1


def count_everything(exchange: Exchange, seq_len: int) -> tuple[Counter, Counter]:
    """The pairs and zero keys of all ranks, while parcels travel as the plan says."""
    pairs, zeros = Counter(), Counter()
    (sequence,), heads, pattern = exchange.sequences, exchange.heads, exchange.pattern
    for pieces in sequence.pieces:
        for queries in pieces:
            for keys in pieces:
                for problem in plan_problems(
                    pattern, queries=queries.span, keys=keys.span, seq_len=seq_len,
                    num_heads=heads.num_heads, num_kv_heads=heads.num_kv_heads,
                    is_causal=exchange.is_causal,
                ):  # fmt: skip
                    first = keys.span.start
                    local = lambda cell, first=first: (first + cell[0], cell[1])  # noqa: E731
                    count(problem, queries.span.start, local, pairs, zeros)
    holders = [{x.owner} for x in exchange.parcels]
    for moves in exchange.moves:
        arrived = []
        for source, destination, numbers in moves:
            for number in numbers:
                assert source in holders[number]
                assert destination not in holders[number]
                arrived.append((number, destination))
                parcel = exchange.parcels[number]
                rate = pattern.dilation_rates[parcel.branch]
                place = {
                    (i, pair): (parcel.positions.start + kept.first + i * rate, kv_head)
                    for kept in kept_of_part(
                        pattern, parcel.branch, seq_len, parcel.positions, heads
                    )
                    for pair, kv_head in zip(kept.lane.pairs, kept.lane.kv_heads, strict=True)
                    for i in range(kept.num_rows)
                }
                is_used = False
                for piece in sequence.pieces[destination]:
                    for problem in parcel_problems(
                        pattern, parcel.branch, seq_len, piece.span, parcel.positions, heads, 1,
                        exchange.is_causal,
                    ):  # fmt: skip
                        count(problem, piece.span.start, place.__getitem__, pairs, zeros)
                        is_used = True
                assert is_used, "a parcel goes only to ranks whose queries see it"
        for number, destination in arrived:
            holders[number].add(destination)
    return pairs, zeros


def planned(case: Case, size: int, layout: str, route: str) -> Exchange:
    heads = Heads(case.num_heads, case.num_kv_heads or case.num_heads, (0, case.num_heads))
    spans = spans_of_ranks(layout, case.seq_len, size)
    sequences = (cut_sequence(spans, 0, case.seq_len),)
    return plan_exchange(
        case.pattern, heads, sequences, size=size, is_causal=case.is_causal, route=route
    )


@settings(deadline=None, max_examples=60)
@given(
    case=random_cases(max_seq_len=40, max_heads=4),
    size=st.integers(1, 9),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    route=st.sampled_from(["ring", "all_gather", "auto"]),
)
def test_every_pair_is_in_exactly_one_problem(case, size, layout, route):
    pairs, zeros = count_everything(planned(case, size, layout, route), case.seq_len)
    group = case.num_heads // (case.num_kv_heads or case.num_heads)
    expected, expected_zeros = Counter(), Counter()
    for head in range(case.num_heads):
        for query in range(case.seq_len):
            seen = visible_keys(
                case.pattern, query, head, num_heads=case.num_heads, seq_len=case.seq_len,
                is_causal=case.is_causal,
            )  # fmt: skip
            expected_zeros[head, query] = seen.zero_keys
            for positions in seen.positions:
                for key in positions:
                    expected[head, query, head // group, key] += 1
    assert pairs == expected
    assert zeros == expected_zeros


@settings(deadline=None, max_examples=60)
@given(
    case=random_cases(max_seq_len=60),
    size=st.integers(1, 9),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    route=st.sampled_from(["ring", "all_gather", "auto"]),
)
def test_gradients_come_home_once_from_each_user(case, size, layout, route):
    exchange = planned(case, size, layout, route)
    contributions = [Counter() for _ in exchange.parcels]  # at home
    travelling = [{user: {user} for user in parcel.users} for parcel in exchange.parcels]
    for moves in exchange.returns:
        for source, destination, numbers in moves:
            for number in numbers:
                sums = travelling[number].pop(source)
                if destination == exchange.parcels[number].owner:
                    contributions[number].update(sums)
                else:
                    travelling[number][destination] |= sums
    for parcel, home in zip(exchange.parcels, contributions, strict=True):
        assert home == Counter(parcel.users)


@settings(deadline=None, max_examples=100)
@given(case=random_cases(max_seq_len=40), num_rows=st.integers(0, 400), start=st.integers(0, 30))
def test_parts_of_problems_are_the_problems(case, num_rows, start):
    queries = Span(min(start, case.seq_len - 1), case.seq_len)
    problems = plan_problems(
        case.pattern, queries=queries, keys=Span(0, case.seq_len), seq_len=case.seq_len,
        num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, is_causal=case.is_causal,
        batch_size=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dilated_ring.plan.parts._FEWEST_ROWS", 1)
        parts = in_parts(problems, num_rows)
    assert all(
        part.queries.num_elements <= max(1, num_rows // 16)
        or part.queries.num_problems == part.keys.num_heads == 1
        for part in parts
    )
    expected, counted = (Counter(), Counter()), (Counter(), Counter())
    for into, some in ((expected, problems), (counted, parts)):
        for problem in some:
            count(problem, queries.start, lambda cell: cell, *into)
    assert counted == expected
