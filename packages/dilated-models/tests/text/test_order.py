"""The order of windows: each once per epoch, and a function of seed and step alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from dilated_models.text.files import text_files
from dilated_models.text.order import WindowOrder
from dilated_models.text.streams import ByteStream


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(101, 10), (1000, 7), (12, 10), (11, 10)])
def test_every_window_comes_once_per_epoch(num_tokens: int, seq_len: int):
    order = WindowOrder(num_tokens=num_tokens, seq_len=seq_len, seed=3)
    n = order.windows_per_epoch
    for epoch in range(3):
        starts = sorted(order.start(epoch * n + i) for i in range(n))
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= num_tokens
        assert all(b - a == seq_len for a, b in itertools.pairwise(starts))


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    def starts(seed: int) -> list[int]:
        order = WindowOrder(num_tokens=100_000, seq_len=16, seed=seed)
        return [order.start(i) for i in range(200)]

    torch.manual_seed(0)
    first = starts(0)
    torch.manual_seed(1)
    assert starts(0) == first
    assert starts(1) != first
    assert first != sorted(first)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2
    epochs = WindowOrder(num_tokens=1000, seq_len=10, seed=0)
    n = epochs.windows_per_epoch
    visits = [[epochs.start(e * n + i) // 10 for i in range(n)] for e in range(2)]
    assert visits[0] != visits[1]
    assert sorted(visits[0]) == sorted(visits[1])


def test_a_batch_is_inputs_and_the_next_tokens(text: Path):
    stream = ByteStream(text_files([text])[0])
    order = WindowOrder(num_tokens=len(stream), seq_len=32, seed=0)
    inputs, targets, num_bytes = order.batch(stream, step=5, batch_size=3)
    assert inputs.shape == targets.shape == (3, 32)
    assert inputs.dtype == targets.dtype == torch.int64
    assert num_bytes == 96
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    start = order.start(16)
    assert bytes(inputs[1].tolist()) == stream.text_of(start, start + 32)


def test_text_shorter_than_a_window():
    with pytest.raises(ValueError, match=r"has 10 tokens; it must have at least seq_len \+ 1 = 11"):
        WindowOrder(num_tokens=10, seq_len=10, seed=0)
