"""What a plan claims: numbers by hand, limits of bytes, FLOPs of ranks, errors."""

import time

import pytest
import torch
from dilated_core import DilatedPattern, Span, select_segments
from dilated_core.testing.cases import random_cases
from dilated_ring.plan.cost import exchange_plan
from hypothesis import given, settings
from hypothesis import strategies as st

PAPER = DilatedPattern([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
GIGAPATH = DilatedPattern(
    [1024, 5792, 32768, 185363, 1048576], [1, 2, 4, 8, 16], head_offsets="blocked"
)


def test_numbers_by_hand():
    # w = S = 8, r = 2, one head: ranks hold 4 positions, of which each keeps 2 rows of k and v.
    plan = exchange_plan(
        DilatedPattern([8], [2]), 8, 2, exchange="ring", num_heads=1, head_dim=4, dtype=2
    )
    rows = 2 * 2 * 4  # k and v, two rows of four numbers
    assert [rank.forward_bytes for rank in plan.ranks] == [rows * 2] * 2
    assert [rank.backward_bytes for rank in plan.ranks] == [rows * 2 + rows * 4] * 2
    assert [rank.forward_flops for rank in plan.ranks] == [4 * 4 * 2 * 4] * 2
    assert plan.gathering_bytes == (2 * 4 * 4 * 2,) * 2
    assert plan.share_of_gathering == 0.5
    assert plan.num_hops == 1
    assert [(x.source, x.destination, x.positions, x.num_bytes) for x in plan.messages(0)] == [
        (0, 1, Span(0, 4), 32),
        (1, 0, Span(4, 8), 32),
    ]
    assert plan.hop_bytes(0) == (32, 32)


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("exchange", ["ring", "all_gather", "auto"])
@pytest.mark.parametrize("shard", [32768, 65536, 98304])
def test_the_pattern_of_the_paper_sends_nothing_on_aligned_shards(layout, exchange, shard):
    # Zigzag shards consist of two parts.
    seq_len = 8 * shard * (2 if layout == "zigzag" else 1)
    plan = exchange_plan(PAPER, seq_len, 8, layout, exchange=exchange, is_causal=True)
    assert plan.forward_bytes == plan.backward_bytes == plan.num_hops == 0
    assert all(branch.is_local for branch in plan.branches)
    if layout == "contiguous":
        assert plan.way == "alone"
        assert "sends nothing: each rank holds whole segments" in str(plan)


def test_gigapath_at_a_million_tokens_sends_a_tenth_of_gathering():
    plan = exchange_plan(GIGAPATH, 1_000_000, 8, exchange="ring", num_heads=16, head_dim=48)
    assert plan.share_of_gathering < 0.1
    assert max(r.forward_bytes for r in plan.ranks) < max(plan.gathering_bytes) / 5


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "auto"])
def test_bytes_of_a_rank_stay_when_length_and_ranks_grow_together(exchange):
    pattern = DilatedPattern([1024, 5000, 32768], [1, 2, 8])
    sent = []
    for size in (4, 16, 64, 256):
        plan = exchange_plan(pattern, 8192 * size, size, exchange=exchange)
        sent.append(max(rank.forward_bytes + rank.backward_bytes for rank in plan.ranks))
    assert max(sent) <= 1.02 * min(sent)  # segments of 5000 fall differently on shards


def test_only_ranks_that_share_a_segment_talk():
    plan = exchange_plan(DilatedPattern([64, 200], [1, 4]), 1000, 10, exchange="ring")
    talk = {(x.source, x.destination) for step in range(plan.num_hops) for x in plan.messages(step)}
    # Segments of 200 are two shards; those of 64 reach over the border of neighbours.
    assert all(abs(a - b) == 1 for a, b in talk)
    aligned = exchange_plan(DilatedPattern([50, 200], [1, 4]), 1000, 10, exchange="ring")
    pairs = {(x.source, x.destination) for x in aligned.messages(0)}
    assert pairs == {(a, a ^ 1) for a in range(10)}


@pytest.mark.parametrize("exchange", ["ring", "all_gather"])
def test_causal_hops_that_see_nothing_do_not_exist(exchange):
    options = {"exchange": exchange, "num_heads": 1, "head_dim": 1, "dtype": 2}
    full = exchange_plan(DilatedPattern([80], [1]), 80, 8, **options)
    causal = exchange_plan(DilatedPattern([80], [1]), 80, 8, is_causal=True, **options)
    assert causal.forward_bytes * 2 == full.forward_bytes
    for step in range(causal.num_hops):
        assert all(x.owner < x.destination for x in causal.messages(step))
    assert causal.ranks[-1].forward_bytes == 0


def test_only_documents_that_cross_a_border_are_exchanged():
    pattern = DilatedPattern([200], [1])
    inside = exchange_plan(
        pattern, 400, 4, exchange="ring", cu_seqlens=[0, 60, 100, 200, 200, 390, 400]
    )
    assert {x.positions for x in inside.messages(0)} == {Span(200, 300), Span(300, 390)}
    none = exchange_plan(pattern, 400, 4, cu_seqlens=torch.tensor([0, 100, 200, 300, 350, 400]))
    assert none.forward_bytes == 0


@settings(deadline=None, max_examples=100)
@given(
    case=random_cases(with_options=True),
    size=st.integers(1, 9),
    layout=st.sampled_from(["contiguous", "zigzag"]),
    exchange=st.sampled_from(["ring", "all_to_all"]),
)
def test_flops_of_all_ranks_are_those_of_the_pattern(case, size, layout, exchange):
    if exchange == "all_to_all" and (case.num_kv_heads or case.num_heads) < size:
        return
    bounds = case.options()["cu_seqlens"]
    plan = exchange_plan(
        case.pattern, case.seq_len, size, layout, exchange=exchange, num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, batch_size=case.batch_size,
        is_causal=case.is_causal, cu_seqlens=bounds, head_range=(2, case.num_heads + 3),
    )  # fmt: skip
    for part, backward in (("forward_flops", False), ("backward_flops", True)):
        expected = sum(
            case.pattern.flops(
                length, case.num_heads, case.head_dim, batch_size=case.batch_size,
                is_causal=case.is_causal, backward=backward, head_range=(2, case.num_heads + 3),
            )
            for length in case.documents or (case.seq_len,)
        )  # fmt: skip
        assert sum(getattr(rank, part) for rank in plan.ranks) == expected


def test_flops_of_a_rank_by_hand():
    # Causal and dense: query i sees i + 1 keys.
    options = {"num_heads": 1, "head_dim": 1, "is_causal": True}
    plan = exchange_plan(DilatedPattern([8], [1]), 8, 2, **options)
    assert [rank.forward_flops for rank in plan.ranks] == [4 * 10, 4 * 26]
    zigzag = exchange_plan(DilatedPattern([8], [1]), 8, 2, "zigzag", **options)
    assert [rank.forward_flops for rank in zigzag.ranks] == [4 * 18, 4 * 18]
    assert (round(plan.balance, 3), zigzag.balance) == (round(18 / 26, 3), 1.0)


def test_auto_takes_what_sends_less():
    dense = DilatedPattern([4096] * 3, [1] * 3)
    plan = exchange_plan(dense, 4096, 4)
    rows = exchange_plan(dense, 4096, 4, exchange="ring")
    heads = exchange_plan(dense, 4096, 4, exchange="all_to_all")
    assert plan.way == "heads"
    assert plan.forward_bytes == heads.forward_bytes < rows.forward_bytes
    assert "all_to_all sends" in plan.reason
    sparse = exchange_plan(DilatedPattern([4096], [8]), 4096, 4)
    assert sparse.way == "rows"
    few = exchange_plan(dense, 4096, 4, num_kv_heads=2)
    assert few.way == "rows"
    assert "2 heads of k and v are too few" in few.reason


def test_a_table_can_be_read():
    text = str(exchange_plan(DilatedPattern([8, 16], [1, 2]), 32, 4, is_causal=True))
    assert "32 positions over 4 ranks, contiguous, causal" in text
    assert "nothing: local" in text
    (line,) = [x for x in text.splitlines() if x.split()[:5] == ["1", "0", "1", "1", "0"]]
    assert line.split()[5:] == ["to", "8", "8.19", "kB"]  # 4 rows, k and v, 8 heads of 64, bf16
    assert len(str(exchange_plan(DilatedPattern([64], [1]), 1000, 100)).splitlines()) < 40


def test_a_billion_positions_over_1024_ranks_take_seconds():
    pattern = select_segments(10**9, num_heads=8).pattern
    begin = time.process_time()
    plan = exchange_plan(pattern, 10**9, 1024, is_causal=True)
    # Work for each position, or for each pair of ranks and branch, would take many minutes.
    assert time.process_time() - begin < 60
    assert max(rank.forward_bytes for rank in plan.ranks) < 100e6
    assert plan.share_of_gathering < 1e-4
    assert plan.balance > 0.99


@pytest.mark.parametrize("seq_len", [0, 1, 3])
def test_fewer_positions_than_ranks(seq_len):
    plan = exchange_plan(DilatedPattern([4], [1]), seq_len, 5)
    assert sum(rank.num_positions for rank in plan.ranks) == seq_len
    assert str(plan)
    assert 0 < plan.balance <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cp_size": 0}, "cp_size is 0; it must be at least 1"),
        ({"layout": "striped"}, "layout is 'striped'"),
        ({"exchange": "p2p"}, "exchange is 'p2p'"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"cu_seqlens": [0, 90]}, "cu_seqlens must ascend from 0 to seq_len, here 100"),
        ({"cu_seqlens": [0, 100], "batch_size": 2}, "packed documents have neither"),
        ({"exchange": "all_to_all", "num_kv_heads": 1}, "each rank needs at least one"),
        ({"head_range": (5, 8)}, "head_range"),
    ],
)
def test_mistakes(change, message):
    arguments = {"pattern": DilatedPattern([16], [1]), "seq_len": 100, "cp_size": 4} | change
    with pytest.raises(ValueError, match=message):
        exchange_plan(**arguments)


def test_messages_of_a_step_that_is_not():
    with pytest.raises(ValueError, match="step is 1; there are 1 hops"):
        list(exchange_plan(DilatedPattern([16], [1]), 16, 2, exchange="ring").messages(1))
