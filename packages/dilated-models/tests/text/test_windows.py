"""Rows cut into windows: no window crosses documents, and every other token is a target once."""

import itertools
from pathlib import Path

import numpy as np
import torch
from dilated_models.text.files import Piece
from dilated_models.text.order import RowOrder
from dilated_models.text.streams import ByteStream
from dilated_models.text.windows import NO_TARGET, PackedWindows, text_row
from hypothesis import given, settings
from hypothesis import strategies as st


class Places:
    """A stream whose token is its own place, which stands for `1 + place % 3` bytes."""

    def __init__(self, lengths: list[int]) -> None:
        self.starts = np.cumsum([0, *lengths[:-1]])
        self.length = sum(lengths)

    def __len__(self) -> int:
        return self.length

    def read(self, start: int, stop: int) -> np.ndarray:
        assert 0 <= start < stop <= self.length
        return np.arange(start, stop)

    def byte_lengths(self, start: int, stop: int) -> np.ndarray:
        return 1 + np.arange(start, stop) % 3

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return self.starts[(self.starts >= start) & (self.starts < stop)]

    def text_of(self, start: int, stop: int) -> bytes:
        raise NotImplementedError

    def document_of(self, place: int) -> int:
        return int(np.searchsorted(self.starts, place, side="right"))


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    seq_len=st.integers(1, 20),
    window=st.integers(1, 25),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 2**64 - 1),
)
def test_an_epoch_of_windows(lengths, seq_len, window, batch_size, seed):
    stream = Places(lengths)
    if len(stream) < seq_len + 1:
        return
    order = RowOrder(num_tokens=len(stream), seq_len=seq_len, seed=seed)
    inputs: list[int] = []
    for first in range(0, order.rows_per_epoch, batch_size):
        samples = range(first, min(first + batch_size, order.rows_per_epoch))
        rows = [
            text_row(stream, order.start(i), order.start(i) + seq_len, window=window)
            for i in samples
        ]
        batch = PackedWindows.of(rows)
        bounds = batch.cu_seqlens.tolist()
        assert (bounds[0], bounds[-1]) == (0, len(samples) * seq_len)
        for start, stop in itertools.pairwise(bounds):
            assert 0 < stop - start <= window
            places = batch.inputs[start:stop].tolist()
            assert places == list(range(places[0], places[0] + stop - start))
            assert stream.document_of(places[0]) == stream.document_of(places[-1])
        for place, target, num_bytes in zip(
            batch.inputs.tolist(), batch.targets.tolist(), batch.byte_lengths.tolist(), strict=True
        ):
            if stream.document_of(place) == stream.document_of(place + 1):
                assert (target, num_bytes) == (place + 1, 1 + (place + 1) % 3)
            else:
                assert (target, num_bytes) == (NO_TARGET, 0)
        assert batch.num_targets == sum(t != NO_TARGET for t in batch.targets.tolist())
        assert batch.num_bytes == batch.byte_lengths.sum()
        inputs += batch.inputs.tolist()
    assert len(set(inputs)) == len(inputs) == order.rows_per_epoch * seq_len
    # One row fewer than fits, so that epochs differ in their phase.
    assert len(inputs) > len(stream) - 1 - 2 * seq_len


def test_a_row_is_cut_no_more_than_needed():
    row = text_row(Places([7, 13, 2, 40]), 3, 43, window=16)
    assert row.starts.tolist() == [0, 4, 16, 17, 19, 32]
    assert (row.targets == NO_TARGET).nonzero()[0].tolist() == [3, 16, 18]
    end = text_row(Places([10, 5]), 0, 10, window=5)  # the target after the row begins a document
    assert (end.starts.tolist(), end.targets[-2:].tolist()) == ([0, 5], [9, NO_TARGET])


def test_the_text_stays_as_it_is(tmp_path: Path):
    """Cutting must not write into what a stream returned."""
    stream = Places([5, 20])
    kept = stream.read(0, 25)
    lengths = stream.byte_lengths(0, 25)
    stream.read = lambda start, stop: kept[start:stop]
    stream.byte_lengths = lambda start, stop: lengths[start:stop]
    text_row(stream, 0, 20, window=8)
    assert kept.tolist() == list(range(25))
    assert lengths.min() == 1
    for name, content in (("a", b"abc"), ("b", b"defgh")):
        (tmp_path / name).write_bytes(content)
    pieces = [Piece(tmp_path / "a", "a", 0, 3), Piece(tmp_path / "b", "b", 0, 5)]
    batch = PackedWindows.of([text_row(ByteStream(pieces), 1, 6, window=10)])
    assert bytes(batch.inputs.tolist()) == b"bcdef"
    assert batch.cu_seqlens.tolist() == [0, 2, 5]
    assert batch.targets.tolist() == [ord("c"), NO_TARGET, *b"efg"]
    assert (batch.inputs.dtype, batch.cu_seqlens.dtype) == (torch.int64, torch.int64)
