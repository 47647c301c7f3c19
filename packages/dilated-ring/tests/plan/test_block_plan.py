"""Plans over patterns of blocks: only kept blocks travel, to who keeps them, and bytes agree."""

from collections import defaultdict
from typing import Any

import dilated_ring.over_ranks
import pytest
import torch
from block_cases import CASES, BlockCase, block_cases
from dilated_core import DilatedPattern
from dilated_ring import exchange_plan, simulated_ring_block_sparse_attention
from dilated_ring.layout import spans_of_ranks
from dilated_ring.plan.blocks import checked_blocks
from dilated_ring.plan.covering import CoveringBlocks
from dilated_ring.plan.exchange import Exchange, plan_exchange
from dilated_ring.plan.parcels import Heads
from dilated_ring.plan.sequences import cut_sequences
from dilated_ring.transport import InProcessTransport
from dilated_sparse import from_dilated, hierarchical, local_window
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LAYOUTS = ["contiguous", "zigzag"]
RANDOM = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.differing_executors]
)


def planned(case: BlockCase, size: int, layout: Any, route: Any) -> Exchange:
    spans = spans_of_ranks(layout, case.seq_len, size)
    cu_seqlens = case.options()["cu_seqlens"]
    bounds = None if cu_seqlens is None else cu_seqlens.tolist()
    return plan_exchange(
        checked_blocks(case.pattern, case.block_size),
        Heads(case.num_heads, case.num_kv_heads, (0, case.num_heads)),
        cut_sequences(spans, case.seq_len, bounds, is_cut_only=False),
        size=size,
        is_causal=case.is_causal,
        route=route,
    )


@RANDOM
@given(
    case=block_cases(),
    size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    route=st.sampled_from(["ring", "all_gather"]),
)
def test_ranks_get_the_blocks_that_they_keep_and_no_others(case, size, layout, route):
    exchange = planned(case, size, layout, route)
    if case.masked is not None:  # which has no part in the plan
        return
    # Brute force, from the mask of single positions.
    sees = case.visible()[0].unflatten(0, (case.num_kv_heads, -1)).any(1)
    held = [
        torch.tensor([i for span in spans for i in range(*span)], dtype=torch.int64)
        for spans in spans_of_ranks(layout, case.seq_len, size)
    ]
    needed = {}
    for user, queries in enumerate(held):
        for owner, keys in enumerate(held):
            if user != owner and len(queries) and len(keys):
                pairs = sees[:, queries][:, :, keys].any(1).nonzero().tolist()
                needed[user, owner] = {(g, int(keys[j])) for g, j in pairs}
    got: defaultdict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    holders = [{x.owner} for x in exchange.parcels]
    for moves in exchange.moves:
        arrived = []
        for source, destination, numbers in moves:
            for number in numbers:
                assert source in holders[number]
                arrived.append((number, destination))
                parcel = exchange.parcels[number]
                start = exchange.sequences[parcel.sequence].start
                got[destination, parcel.owner] += [
                    (g, start + i) for g in parcel.kv_heads for a, b in parcel.spans
                    for i in range(a, b)
                ]  # fmt: skip
        assert arrived, "a step without a message"
        for number, destination in arrived:
            holders[number].add(destination)
    for pair, positions in needed.items():
        assert len(got[pair]) == len(set(got[pair])), "rows travel once"
        assert set(got[pair]) == positions


def count(case: BlockCase, size: int, layout: str, exchange: str) -> None:
    """What each rank of one process sends, and in which step, beside the plan."""
    if exchange == "all_to_all" and case.num_kv_heads < size:
        return
    sent: defaultdict[int, int] = defaultdict(int)
    hops: defaultdict[str, list[int]] = defaultdict(lambda: [0] * size)

    class Counting(InProcessTransport):
        def start(self, rank, sends, receives, *, step):
            before = self.sent_bytes
            pending = super().start(rank, sends, receives, step=step)
            sent[rank] += self.sent_bytes - before
            hops[step][rank] += self.sent_bytes - before
            return pending

    call = case.options()
    plan = exchange_plan(
        case.pattern, case.seq_len, size, layout, block_size=case.block_size, exchange=exchange,
        num_heads=case.num_heads, num_kv_heads=case.num_kv_heads, head_dim=8, dtype=torch.float32,
        batch_size=case.batch_size, is_causal=case.is_causal, cu_seqlens=call["cu_seqlens"],
        has_key_padding_mask=case.masked is not None,
    )  # fmt: skip
    q, k, v, dout = case.tensors(torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dilated_ring.over_ranks, "InProcessTransport", Counting)
        out = simulated_ring_block_sparse_attention(
            q, k, v, case.pattern, case.block_size, ring_size=size, layout=layout,
            exchange=exchange, **call,
        )  # fmt: skip
        assert [sent[rank] for rank in range(size)] == [r.forward_bytes for r in plan.ranks]
        if plan.way == "rows" and case.masked is None:
            assert list(hops.values()) == [list(plan.hop_bytes(i)) for i in range(plan.num_hops)]
        sent.clear()
        out.backward(dout)
        assert [sent[rank] for rank in range(size)] == [r.backward_bytes for r in plan.ranks]
    if case.masked is None:
        flops = 4 * 8 * int(case.visible().sum())
        assert sum(rank.forward_flops for rank in plan.ranks) == flops


@RANDOM
@given(
    case=block_cases(),
    size=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    exchange=st.sampled_from(["ring", "all_gather", "all_to_all", "auto"]),
)
def test_bytes_and_flops_of_random_cases(case, size, layout, exchange):
    count(case, size, layout, exchange)


@pytest.mark.parametrize("exchange", ["ring", "all_gather", "all_to_all", "auto"])
def test_bytes_with_masks_and_documents(exchange):
    for number in (3, 5, 7, 10, 11):
        count(CASES[number], 2, LAYOUTS[number % 2], exchange)


def test_hops_without_a_kept_block_do_not_take_place():
    started: list[str] = []

    class Counting(InProcessTransport):
        def start(self, rank, sends, receives, *, step):
            if sends:
                started.append(f"{step}: {rank} to {list(sends)}")
            return super().start(rank, sends, receives, step=step)

    q, k, v = torch.randn(3, 1, 128, 2, 8).unbind()
    near, dense = local_window(32, window=2), local_window(32, window=32)
    for pattern, is_causal, hops, messages in [
        (near, True, 1, 7),  # each rank to the next one
        (near, False, 1, 7 + 7),
        (dense, True, 7, 7 + 6 + 5 + 4 + 3 + 2 + 1),
        (dense, False, 7, 7 * 8),
        (local_window(32, window=0), False, 0, 0),
    ]:
        plan = exchange_plan(
            pattern, 128, 8, block_size=4, exchange="ring", is_causal=is_causal, num_heads=2
        )
        assert plan.num_hops == hops
        sent = [(x.source, x.destination) for i in range(hops) for x in plan.messages(i)]
        assert len(sent) == messages
        if pattern is near:
            assert all(abs(a - b) == 1 for a, b in sent)
        started.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dilated_ring.over_ranks, "InProcessTransport", Counting)
            simulated_ring_block_sparse_attention(
                q, k, v, pattern, 4, ring_size=8, is_causal=is_causal, exchange="ring"
            )
        assert len({text.split(":")[0] for text in started}) == hops
        # A message in both directions is one call of a rank in a step.
        assert len(started) == messages if is_causal else messages // 2 <= len(started) <= messages


def test_a_hierarchy_sends_few_blocks_over_many_ranks():
    """Its rows keep O(log N) blocks, so bytes of a rank hardly grow when length and ranks do."""
    options = {"block_size": 64, "exchange": "all_gather", "num_heads": 4}
    plans = [
        exchange_plan(hierarchical(64 * size), 4096 * size, size, **options)
        for size in (2, 4, 8, 16)
    ]
    most = [max(rank.forward_bytes for rank in plan.ranks) for plan in plans]
    shares = [plan.share_of_gathering for plan in plans]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] < 0.2
    assert shares[-1] < 0.05
    # 8 times the length: the blocks at the ends of shards, and a few that stand for far cells.
    assert most[-1] < 6 * most[0]


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize(
    ("lengths", "rates", "block_size"),
    [([16, 40], [1, 3], 8), ([50], [7], 4), ([5, 33], [2, 9], 3), ([12], [1], 64), ([8], [12], 2)],
)
def test_blocks_that_branches_touch(lengths, rates, block_size, num_heads):
    for head_offsets in ("interleaved", "blocked"):
        branches = DilatedPattern(lengths, rates, head_offsets=head_offsets)
        for seq_len in (1, 32, 67):
            covering = CoveringBlocks(branches, num_heads, block_size).pattern_for(seq_len)
            expected = from_dilated(branches, seq_len, block_size, num_heads)
            rows = [[row.tolist() for row in head] for head in expected.rows()]
            assert covering.rows() == rows


def test_the_table_and_mistakes():
    pattern = local_window(32, window=1)
    text = str(exchange_plan(pattern, 2048, 4, exchange="ring"))
    assert "branch  w" not in text
    assert "rank  positions" in text
    with pytest.raises(ValueError, match="block_size is 8 and pattern a DilatedPattern"):
        exchange_plan(DilatedPattern([8], [1]), 64, 2, block_size=8)
    with pytest.raises(ValueError, match="the pattern has 32 blocks; 64 positions"):
        exchange_plan(pattern, 64, 2)
    with pytest.raises(TypeError, match="pattern is a str; it must be a DilatedPattern"):
        exchange_plan("window", 64, 2)
