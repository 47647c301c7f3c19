"""The executor sends what the plan says, to the byte: each rank, forward and backward."""

from collections import defaultdict

import dilated_ring.over_ranks
import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.testing.cases import AWKWARD_CASES, Case, random_cases
from dilated_core.testing.processes import run_processes
from dilated_ring import ring_dilated_attention, simulated_ring_attention
from dilated_ring.plan.cost import ExchangePlan, exchange_plan
from dilated_ring.transport import DistributedTransport, InProcessTransport
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXCHANGES = ["ring", "all_gather", "all_to_all", "auto"]
LAYOUTS = ["contiguous", "zigzag"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def plan_of(case: Case, size: int, layout: str, exchange: str, dtype: torch.dtype) -> ExchangePlan:
    options = case.options()
    return exchange_plan(
        case.pattern, case.seq_len, size, layout, exchange=exchange, num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads, head_dim=case.head_dim, dtype=dtype,
        batch_size=case.batch_size, is_causal=case.is_causal, cu_seqlens=options["cu_seqlens"],
        has_key_padding_mask=options["key_padding_mask"] is not None,
    )  # fmt: skip


def compare(case: Case, size: int, layout: str, exchange: str, dtype: torch.dtype) -> None:
    """Count what each rank of one process sends, and in which step."""
    if exchange == "all_to_all" and (case.num_kv_heads or case.num_heads) < size:
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

    plan = plan_of(case, size, layout, exchange, dtype)
    q, k, v, dout = case.tensors(dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dilated_ring.over_ranks, "InProcessTransport", Counting)
        out = simulated_ring_attention(
            q, k, v, case.pattern, ring_size=size, layout=layout, exchange=exchange,
            **case.options(),
        )  # fmt: skip
        assert [sent[rank] for rank in range(size)] == [r.forward_bytes for r in plan.ranks]
        if plan.way == "rows" and not case.masked:
            assert list(hops.values()) == [list(plan.hop_bytes(i)) for i in range(plan.num_hops)]
        sent.clear()
        out.backward(dout)
        assert [sent[rank] for rank in range(size)] == [r.backward_bytes for r in plan.ranks]


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.differing_executors])
@given(
    case=random_cases(with_options=True),
    size=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    exchange=st.sampled_from(EXCHANGES),
    dtype=st.sampled_from(DTYPES),
)
def test_random_cases_in_one_process(case, size, layout, exchange, dtype):
    compare(case, size, layout, exchange, dtype)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_and_documents(layout, exchange):
    by_name = {case.name: case for case in AWKWARD_CASES}
    for name in ("masked", "packed, causal", "grouped queries, blocked"):
        compare(by_name[name], 3, layout, exchange, torch.float32)


@pytest.mark.parametrize(("layout", "sent"), [("zigzag", 2 * 8 * 3), ("contiguous", 0)])
def test_masks_where_no_rows_travel(layout, sent):
    # Two parts of a shard are one call each, which needs the mask of the whole sequence.
    case = Case(seq_len=32, batch_size=2, masked=0.5, pattern=DilatedPattern([4], [1]))
    plan = plan_of(case, 4, layout, "auto", torch.float32)
    assert [rank.forward_bytes for rank in plan.ranks] == [sent] * 4
    compare(case, 4, layout, "auto", torch.float32)


def _count_over_gloo(size: int) -> list[tuple[str, list[int], list[int]]]:
    """(what, bytes sent, bytes planned), forward and backward, of this rank."""
    transports: list[DistributedTransport] = []

    class Recorded(DistributedTransport):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            transports.append(self)

    dilated_ring.over_ranks.DistributedTransport = Recorded
    rank = torch.distributed.get_rank()
    by_name = {case.name: case for case in AWKWARD_CASES}
    counted: list[tuple[str, list[int], list[int]]] = []
    names = ("tail, causal", "masked", "packed", "grouped queries, causal")
    for number, name in enumerate(names):
        case = by_name[name]
        for exchange in EXCHANGES:
            layout = LAYOUTS[number % 2]
            if exchange == "all_to_all" and (case.num_kv_heads or case.num_heads) < size:
                continue
            plan = plan_of(case, size, layout, exchange, torch.float32)
            planned = plan.ranks[rank]
            held = [i for span in planned.positions for i in range(*span)]
            tensors = case.tensors(dtype=torch.float32)
            dim = tensors[0].dim() - 3
            q, k, v, dout = (x.detach().index_select(dim, torch.tensor(held)) for x in tensors)
            options = case.options()
            if (mask := options["key_padding_mask"]) is not None:
                options["key_padding_mask"] = mask[:, held]
            q, k, v = (x.requires_grad_() for x in (q, k, v))
            transports.clear()
            out = ring_dilated_attention(
                q, k, v, case.pattern, layout=layout, exchange=exchange, **options
            )
            forward = sum(x.sent_bytes for x in transports)
            out.backward(dout)
            backward = sum(x.sent_bytes for x in transports) - forward
            what = f"{name}, {layout}, {exchange}"
            planned_bytes = [planned.forward_bytes, planned.backward_bytes]
            counted.append((what, [forward, backward], planned_bytes))
    return counted


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_ranks(size):
    for counted in run_processes(_count_over_gloo, size, size):
        assert len(counted) > 10
        for what, sent, planned in counted:
            assert sent == planned, what
