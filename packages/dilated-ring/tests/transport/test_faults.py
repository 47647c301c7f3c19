"""One rank fails in any way: every rank ends in time, with an error that names it and the cause."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from dilated_core.testing import run_processes
from dilated_ring.transport import (
    DistributedTransport,
    InProcessTransport,
    RankFailure,
    check_agreement,
    reporting_failures,
)
from dilated_ring.transport.waits import blocking_ranks

# Long enough for a busy machine, so that what is found early is told from what times out.
_LONG_S = 60.0
_SHORT_S = 3.0

_CULPRIT = 1
_RANKS = 3


def _hop(transport: DistributedTransport, step: str) -> float:
    (rank,) = transport.hosted
    left = (rank - 1) % transport.size
    sends = {(rank + 1) % transport.size: torch.full((1000,), float(rank))}
    return float(transport.start(rank, sends, {left: torch.zeros(1000)}, step=step).wait()[left][0])


def _calls(transport: DistributedTransport, fault: Callable[[], None]) -> None:
    """Three calls of two hops; the culprit has its fault in the second, between the hops."""
    (rank,) = transport.hosted
    for call in range(3):
        with reporting_failures(transport, rank):
            assert check_agreement(transport, rank, {"op": "forward"}, rank) == [0, 1, 2]
            assert _hop(transport, "hop 1 of 2") == (rank - 1) % 3
            if call == 1 and rank == _CULPRIT:
                fault()
            assert _hop(transport, "hop 2 of 2") == (rank - 1) % 3


def _out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def _raise() -> None:
    raise KeyError("weights")


def _hang() -> None:
    time.sleep(_SHORT_S + 1.5)


def _be_slow() -> None:
    time.sleep(1.0)


def _nothing() -> None:
    pass


def _wait_in_a_circle(transport: DistributedTransport) -> None:
    (rank,) = transport.hosted
    with reporting_failures(transport, rank):
        _hop(transport, f"hop {rank}")


def _send_another_size(transport: DistributedTransport) -> None:
    (rank,) = transport.hosted
    with reporting_failures(transport, rank):
        _exchange(transport, torch.zeros(9 if rank == _CULPRIT else 8))


def _send_another_dtype(transport: DistributedTransport) -> None:
    (rank,) = transport.hosted
    with reporting_failures(transport, rank):
        _exchange(transport, torch.zeros(8, dtype=torch.float16 if rank == 2 else torch.bfloat16))


def _exchange(transport: DistributedTransport, value: torch.Tensor) -> None:
    (rank,) = transport.hosted
    left, right = (rank - 1) % transport.size, (rank + 1) % transport.size
    transport.start(rank, {right: value}, {left: torch.empty_like(value)}, step="hop 1").wait()
    check_agreement(transport, rank, {}, 0)


def _disagree(transport: DistributedTransport) -> None:
    (rank,) = transport.hosted
    description = {"dtype": "torch.float32", "pattern": "w 8, r 1", "exchange": "ring"}
    if rank == 2:
        description |= {"dtype": "torch.bfloat16", "exchange": "all_gather"}
    with reporting_failures(transport, rank):
        check_agreement(transport, rank, description, 5)


def _miss_an_argument(transport: DistributedTransport) -> None:
    (rank,) = transport.hosted
    with reporting_failures(transport, rank):
        check_agreement(transport, rank, {"window": "4"} if rank == 0 else {}, 5)


def _refuse_an_argument(transport: DistributedTransport) -> None:
    (rank,) = transport.hosted
    with reporting_failures(transport, rank):
        if rank == _CULPRIT:
            raise ValueError("q has 3 dimensions; it must have 4.")
        check_agreement(transport, rank, {}, 5)


_SCENARIOS: dict[str, tuple[float, Callable[[DistributedTransport], None]]] = {
    "nothing": (_LONG_S, lambda transport: _calls(transport, _nothing)),
    "slow": (_LONG_S, lambda transport: _calls(transport, _be_slow)),
    "out of memory": (_LONG_S, lambda transport: _calls(transport, _out_of_memory)),
    "raises": (_LONG_S, lambda transport: _calls(transport, _raise)),
    "hangs": (_SHORT_S, lambda transport: _calls(transport, _hang)),
    "circle": (_SHORT_S, _wait_in_a_circle),
    "size": (_SHORT_S, _send_another_size),
    "dtype": (_SHORT_S, _send_another_dtype),
    "disagree": (_LONG_S, _disagree),
    "misses": (_LONG_S, _miss_an_argument),
    "refuses": (_LONG_S, _refuse_an_argument),
}


def _run_scenarios() -> dict[str, dict[str, object]]:
    """How each scenario ended on this rank. Each has a group of its own, which it may close."""
    endings: dict[str, dict[str, object]] = {}
    for name, (timeout_s, scenario) in _SCENARIOS.items():
        transport = DistributedTransport(dist.new_group(), timeout_s=timeout_s)
        dist.barrier()
        start = time.monotonic()
        ending: dict[str, object] = {"type": "none", "text": "", "again": ""}
        try:
            scenario(transport)
        except BaseException as error:
            notes = " ".join(getattr(error, "__notes__", []))
            ending |= {"type": type(error).__name__, "text": str(error), "notes": notes}
        ending["seconds"] = time.monotonic() - start
        dist.barrier()
        try:
            transport.all_gather(transport.hosted[0], torch.zeros(1))
        except RankFailure as error:
            ending["again"] = str(error)
        endings[name] = ending
    return endings


@pytest.fixture(scope="module")
def endings() -> list[dict[str, dict]]:
    return run_processes(_run_scenarios, _RANKS)


@pytest.mark.parametrize("name", ["nothing", "slow"])
def test_calls_without_a_fault_end_well(name: str, endings: list[dict[str, dict]]) -> None:
    for of_rank in endings:
        assert of_rank[name]["type"] == "none", of_rank[name]
        assert of_rank[name]["again"] == ""


@pytest.mark.parametrize(
    ("name", "type_", "cause"),
    [
        ("out of memory", "OutOfMemoryError", "OutOfMemoryError: CUDA out of memory. Tried to"),
        ("raises", "KeyError", "KeyError: 'weights'. It was in call 2, after step 'hop 1 of 2'."),
        (
            "refuses",
            "ValueError",
            "ValueError: q has 3 dimensions; it must have 4. It was in call 1, before",
        ),
    ],
)
def test_an_error_on_one_rank_ends_all_early_with_its_cause(
    name: str, type_: str, cause: str, endings: list[dict[str, dict]]
) -> None:
    for rank, of_rank in enumerate(endings):
        ending = of_rank[name]
        assert ending["seconds"] < _LONG_S / 2
        if rank == _CULPRIT:
            assert ending["type"] == type_
            assert "told that rank 1 raised this" in ending["notes"]
        else:
            assert ending["type"] == "RankFailure"
            assert ending["text"].startswith(f"rank 1 failed: {cause}")
        # The group stays closed: no rank goes on out of step with the others.
        assert ending["again"].startswith(f"rank 1 failed: {cause}")


def test_a_rank_that_hangs_is_named_with_the_line_where_it_is(
    endings: list[dict[str, dict]],
) -> None:
    for of_rank in endings:
        ending = of_rank["hangs"]
        assert ending["type"] == "RankFailure"
        assert ending["text"].startswith("rank 1 failed: it holds up rank ")
        assert "call 2, step 'hop 2 of 2'" in ending["text"]
        assert "It is at test_faults.py:" in ending["text"]
        assert "in _hang, not in an exchange, in call 2, after step 'hop 1 of 2'" in ending["text"]


@pytest.mark.parametrize("name", ["size", "dtype"])
def test_a_message_of_another_size_or_dtype_is_never_received(
    name: str, endings: list[dict[str, dict]]
) -> None:
    for of_rank in endings:
        ending = of_rank[name]
        assert ending["type"] == "RankFailure"
        assert "wait for each other, so their plans or messages differ" in ending["text"]
        assert "step 'hop 1'" in ending["text"]
        assert ending["seconds"] < _LONG_S / 2


def test_ranks_that_wait_for_each_other_are_named(endings: list[dict[str, dict]]) -> None:
    for of_rank in endings:
        ending = of_rank["circle"]
        assert ending["type"] == "RankFailure"
        assert (
            "rank 0 failed: ranks wait for each other, so their plans or messages differ: rank 0 "
            in ending["text"]
        )
        assert "step 'hop 2'" in ending["text"]
        assert ending["seconds"] < _LONG_S / 2


def test_arguments_that_differ_are_named_alike_on_all_ranks(endings: list[dict[str, dict]]) -> None:
    for of_rank in endings:
        assert of_rank["disagree"]["type"] == "DisagreementError"
        assert of_rank["disagree"]["text"] == (
            "The ranks of the group differ: dtype is torch.float32 on ranks 0, 1; torch.bfloat16 "
            "on rank 2. exchange is ring on ranks 0, 1; all_gather on rank 2. Pass the same on all "
            "ranks."
        )
        assert of_rank["misses"]["text"] == (
            "The ranks of the group differ: window is 4 on rank 0; nothing on ranks 1, 2. Pass the "
            "same on all ranks."
        )
        # The group stays usable, because no rank is out of step.
        assert of_rank["disagree"]["again"] == of_rank["misses"]["again"] == ""


def test_ranks_of_one_process_need_no_report() -> None:
    transport = InProcessTransport(2)
    with pytest.raises(KeyError), reporting_failures(transport, 1):
        raise KeyError("weights")


@pytest.mark.parametrize(
    ("waits", "ends", "way"),
    [
        ({}, [0], []),
        ({0: [1], 1: [2], 3: [0]}, [2], [0, 1]),
        ({0: [1, 2], 1: [2], 2: [3]}, [3], [0, 1, 2]),
        ({0: [1, 2], 1: [0]}, [2], [0, 1]),
        ({0: [1], 1: [2], 2: [1]}, [], [0, 1, 2]),
    ],
)
def test_blocking_ranks_are_at_the_ends_of_the_waits(
    waits: dict[int, list[int]], ends: list[int], way: list[int]
) -> None:
    assert blocking_ranks(0, waits) == (ends, way)
