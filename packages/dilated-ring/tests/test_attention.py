"""Attention over ranks equals the oracle of the whole sequence, forward and backward."""

import pytest
import torch
from dilated_core import DilatedPattern
from dilated_core.reference import reference_dilated_attention
from dilated_core.testing.cases import AWKWARD_CASES, Case, random_cases
from dilated_ring import simulated_ring_attention
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

EXCHANGES = ["ring", "all_gather", "all_to_all", "auto"]
LAYOUTS = ["contiguous", "zigzag"]


def compare(case: Case, ring_size: int, layout: str, exchange: str, backend: str = "eager") -> None:
    if exchange == "all_to_all" and (case.num_kv_heads or case.num_heads) < ring_size:
        return
    q, k, v, dout = case.tensors(dtype=torch.float64)
    options = case.options()
    # A gradient that is no contiguous tensor.
    dout = dout.transpose(-1, -2).contiguous().transpose(-1, -2)
    exact = reference_dilated_attention(q, k, v, case.pattern, **options)
    want = torch.autograd.grad(exact, (q, k, v), dout)
    out = simulated_ring_attention(
        q, k, v, case.pattern, ring_size=ring_size, layout=layout, exchange=exchange,
        backend=backend, **options,
    )  # fmt: skip
    got = torch.autograd.grad(out, (q, k, v), dout)
    assert (out - exact).abs().max() < 1e-9
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-8


@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: case.name)
def test_awkward_cases(case: Case) -> None:
    number = AWKWARD_CASES.index(case)
    # Each layout and exchange meets every shape of trouble; the product of all is a sweep.
    compare(case, 2 + number % 3, LAYOUTS[number % 2], EXCHANGES[number // 2 % 4])
    compare(case, 8 - number % 4, LAYOUTS[1 - number % 2], EXCHANGES[(number + 1) % 4])


@pytest.mark.exhaustive
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", AWKWARD_CASES, ids=lambda case: case.name)
def test_all_awkward_cases(case: Case, layout: str, exchange: str) -> None:
    for ring_size in (1, 2, 3, 4, 8):
        compare(case, ring_size, layout, exchange)


ATTENDED = Case(
    seq_len=41, num_heads=5, pattern=DilatedPattern([10, 41], [3, 4], padding="attended")
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.differing_executors])
@given(
    case=random_cases(with_options=True),
    ring_size=st.integers(1, 9),
    layout=st.sampled_from(LAYOUTS),
    exchange=st.sampled_from(EXCHANGES),
    backend=st.sampled_from(["eager", "sdpa"]),
)
# Zero keys that come with a part of which a head keeps nothing.
@example(ATTENDED, 8, "zigzag", "ring", "eager")
def test_random_cases(case: Case, ring_size: int, layout: str, exchange: str, backend: str) -> None:
    compare(case, ring_size, layout, exchange, backend)
