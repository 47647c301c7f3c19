"""The order of rows: each once per epoch, and a function of seed and step alone."""

import itertools

import numpy as np
import pytest
import torch
from dilated_models.text.order import RowOrder


@pytest.mark.parametrize(("num_tokens", "seq_len"), [(101, 10), (1000, 7), (12, 10), (11, 10)])
def test_every_row_comes_once_per_epoch(num_tokens: int, seq_len: int):
    order = RowOrder(num_tokens=num_tokens, seq_len=seq_len, seed=3)
    n = order.rows_per_epoch
    for epoch in range(3):
        starts = sorted(order.start(epoch * n + i) for i in range(n))
        assert starts[0] >= 0
        assert starts[-1] + seq_len + 1 <= num_tokens
        assert all(b - a == seq_len for a, b in itertools.pairwise(starts))


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    def starts(seed: int) -> list[int]:
        order = RowOrder(num_tokens=100_000, seq_len=16, seed=seed)
        return [order.start(i) for i in range(200)]

    torch.manual_seed(0)
    first = starts(0)
    torch.manual_seed(1)
    assert starts(0) == first
    assert starts(1) != first
    assert first != sorted(first)
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.2
    epochs = RowOrder(num_tokens=1000, seq_len=10, seed=0)
    n = epochs.rows_per_epoch
    visits = [[epochs.start(e * n + i) // 10 for i in range(n)] for e in range(2)]
    assert visits[0] != visits[1]
    assert sorted(visits[0]) == sorted(visits[1])


def test_text_shorter_than_a_row():
    with pytest.raises(ValueError, match=r"has 10 tokens; it must have at least seq_len \+ 1 = 11"):
        RowOrder(num_tokens=10, seq_len=10, seed=0)
