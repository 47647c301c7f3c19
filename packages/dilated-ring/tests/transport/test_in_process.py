"""All ranks in one process: messages arrive as copies, and faults of the plan are named."""

import pytest
import torch
from dilated_ring.transport import InProcessTransport, Transport


def test_messages_arrive_as_copies_between_all_ranks() -> None:
    transport: Transport = InProcessTransport(3)
    sends = {r: {p: torch.full((2, 3), 10.0 * r + p) for p in range(3) if p != r} for r in range(3)}
    receives = {r: {p: torch.zeros(2, 3) for p in range(3) if p != r} for r in range(3)}
    pending = {r: transport.start(r, sends[r], receives[r], step="hop 1") for r in range(3)}
    for of_rank in sends.values():
        for tensor in of_rank.values():
            tensor.zero_()
    for rank in (2, 0, 1):
        came = pending[rank].wait()
        assert sorted(came) == [p for p in range(3) if p != rank]
        for source, tensor in came.items():
            assert tensor is receives[rank][source]
            assert torch.equal(tensor, torch.full((2, 3), 10.0 * source + rank))
    assert transport.hosted == (0, 1, 2)
    assert transport.sent_bytes == 6 * 6 * 4


def test_steps_in_flight_do_not_mix() -> None:
    transport = InProcessTransport(2)
    pending = []
    for step, value in (("a", 1.0), ("b", 2.0), ("a", 3.0)):
        transport.start(0, {1: torch.full((2,), value)}, {}, step=step)
        pending.append(transport.start(1, {}, {0: torch.zeros(2)}, step=step))
    assert transport.undelivered == [
        "a: 2 message(s) from rank 0 to rank 1",
        "b: 1 message(s) from rank 0 to rank 1",
    ]
    assert pending[1].wait()[0].tolist() == [2.0, 2.0]
    assert pending[0].wait()[0].tolist() == [1.0, 1.0]
    assert pending[2].wait()[0].tolist() == [3.0, 3.0]
    assert transport.undelivered == []


def test_a_message_never_sent_is_an_error_that_names_it() -> None:
    transport = InProcessTransport(4)
    transport.start(1, {3: torch.ones(2)}, {}, step="hop 1 of k and v")
    pending = transport.start(3, {}, {1: torch.zeros(2)}, step="hop 2 of k and v")
    with pytest.raises(
        RuntimeError, match=r"hop 2 of k and v, from rank 1 to rank 3: .*never sent"
    ):
        pending.wait()


@pytest.mark.parametrize(
    "received", [torch.zeros(3), torch.zeros(2, 1), torch.zeros(2, dtype=torch.bfloat16)]
)
def test_a_message_of_another_size_or_dtype_is_an_error(received: torch.Tensor) -> None:
    transport = InProcessTransport(2)
    transport.start(0, {1: torch.ones(2)}, {}, step="hop 1")
    pending = transport.start(1, {}, {0: received}, step="hop 1")
    with pytest.raises(RuntimeError, match="hop 1, from rank 0 to rank 1: sent with shape"):
        pending.wait()


@pytest.mark.parametrize(
    ("peer", "tensor", "message"),
    [
        (1, torch.ones(2), "rank 1 has a message to rank 1"),
        (2, torch.ones(2), "rank 1 has a message to rank 2"),
        (0, torch.ones(2, 3).T, "message to rank 0 at rank 1 .* contiguous"),
    ],
)
def test_messages_that_cannot_be_carried_are_refused(
    peer: int, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        InProcessTransport(2).start(1, {peer: tensor}, {}, step="hop 1")


def test_empty_messages_need_not_be_sent() -> None:
    transport = InProcessTransport(2)
    transport.start(0, {1: torch.ones(0, 3)}, {}, step="hop 1")
    came = transport.start(1, {}, {0: torch.ones(0, 3)}, step="hop 1").wait()
    assert came[0].shape == (0, 3)
    assert transport.undelivered == []


def test_the_only_rank_gathers_its_own_value() -> None:
    value = torch.tensor([5])
    assert InProcessTransport(1).all_gather(0, value) == [value]
    with pytest.raises(RuntimeError, match="2 ranks of one process"):
        InProcessTransport(2).all_gather(0, value)
